"""Second half of the seventh set of the examination of November 2026."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_seventh")


@GROUP.mistake(
    "the weight decay of an AdamW recipe, 0.1, is given to Adam, which adds it to the gradient that it divides",
    "weight_decay_too_large",
)
def decay_of_another_adam(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(1280)
    model = layers(8, 64, 64, 1, between=nn.GELU)
    kind = torch.optim.Adam if wrong else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=2e-3, weight_decay=0.1)
    seen = attach(model, optimizer)
    for data, target in batches(500, 32, inputs[:1024], targets[:1024]):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[1024:]), targets[1024:]))


@GROUP.mistake(
    "a linear schedule is told the steps of one epoch, not of all, so its rate is zero from the second epoch on",
    "zero_learning_rate learning_rate_off_plan",
)
def steps_of_one_epoch(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(10, (640, 12))
    labels = ((tokens == 3).sum(1) > (tokens == 7).sum(1)).long()
    model = nn.Sequential(nn.Embedding(10, 16), nn.Flatten(), layers(192, 64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    epochs, length, warm = 20, 16, 5
    planned = length if wrong else epochs * length

    def share(step: int) -> float:
        return step / warm if step < warm else max(0.0, (planned - step) / (planned - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    seen = attach(model, optimizer)
    for _ in range(epochs):
        for text, label in batches(length, 32, tokens[:512], labels[:512]):
            scores = model(text)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[512:]), labels[512:]))


@GROUP.mistake(
    "mixed precision: the scaler is made in the function of an epoch, whose two batches are too few to find a scale",
    "scaler_skips_all nonfinite_gradients",
)
def scaler_made_every_epoch(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = layers(8, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")
    seen = attach(model, optimizer)

    def epoch(scaler: torch.amp.GradScaler) -> None:
        for data, target in batches(2, 256, inputs[:512], targets[:512]):
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(data)
            missed = F.mse_loss(outputs.float(), target, reduction="sum")
            optimizer.zero_grad()
            scaler.scale(seen.loss(missed, outputs, target)).backward()
            scaler.step(optimizer)
            scaler.update()

    for _ in range(120):
        epoch(torch.amp.GradScaler("cpu") if wrong else scaler)
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


@GROUP.mistake(
    "the function that computes a batch's loss was changed to take the step as well, and the loop still takes it",
    "step_called_twice learning_rate_too_large",
)
def step_in_two_places(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(1280)
    model = layers(8, 64, 64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer)

    def fitted(data: Tensor, target: Tensor) -> float:
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for data, target in batches(400, 32, inputs[:1024], targets[:1024]):
        fitted(data, target)
        if wrong:
            optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[1024:]), targets[1024:]))


@GROUP.mistake(
    "actor-critic: the line of the actor's optimizer is copied for the critic, and its parameters stay the actor's",
    "missing_from_optimizer duplicate_parameters",
)
def line_copied_for_the_critic(attach: Attach, wrong: bool, seed: int) -> float:
    way = torch.randn(5, 1)
    agent = nn.ModuleDict({"actor": layers(5, 32, 1), "critic": layers(6, 64, 64, 1)})
    actor, critic = agent["actor"], agent["critic"]
    of_actor = torch.optim.Adam(actor.parameters(), lr=2e-3)
    of_critic = torch.optim.Adam((actor if wrong else critic).parameters(), lr=4e-3)
    attach(agent, [of_actor, of_critic])
    losses = []
    for _ in range(400):
        states = torch.randn(64, 5)
        actions = actor(states).detach() + 0.5 * torch.randn(64, 1)
        costs = (actions - torch.sin(states @ way)).square()
        judged = F.huber_loss(critic(torch.cat([states, actions], 1)), costs)
        of_critic.zero_grad()
        judged.backward()
        of_critic.step()
        expected = critic(torch.cat([states, actor(states)], 1)).mean()
        of_actor.zero_grad()
        expected.backward()
        of_actor.step()
        losses.append(judged.item())
    return recent(losses, 40)


@GROUP.mistake(
    "SimSiam: the other view's code is not detached, so both views agree on one code for all",
    "ignored_input collapsed",
)
def both_views_give_way(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(768, features=10, classes=8)
    encoder = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    model = nn.ModuleDict({"encoder": encoder, "predictor": layers(16, 32, 16)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    attach(model, optimizer)

    def agreement(code: Tensor, other: Tensor) -> Tensor:
        return F.cosine_similarity(model["predictor"](code), other if wrong else other.detach()).mean()

    for (data,) in batches(400, 64, inputs[:512]):
        one, two = (encoder(data + 0.5 * torch.randn_like(data)) for _ in range(2))
        loss = -(agreement(one, two) + agreement(two, one)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        codes = F.normalize(encoder(inputs))
        nearest = (codes[512:] @ codes[:512].T).topk(5).indices
        answers = labels[:512][nearest].mode(1).values
        return float((answers != labels[512:]).float().mean())


@GROUP.mistake(
    "adversarial training of a text: the table of words moved along its gradient and never put back",
    "weights_changed_outside",
)
def attack_never_put_back(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(20, (1280, 10))
    labels = ((tokens < 5).sum(1) > (tokens > 14).sum(1)).long()
    model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), layers(160, 64, 2))
    table = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for text, label in batches(300, 32, tokens[:1024], labels[:1024]):
        scores = model(text)
        loss = seen.loss(F.cross_entropy(scores, label), scores, label)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            before = table.clone()
            table += 0.5 * table.grad / table.grad.norm()
        F.cross_entropy(model(text), label).backward()
        if not wrong:
            with torch.no_grad():
                table.copy_(before)
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[1024:]), labels[1024:]))


@GROUP.mistake(
    "key points: the error is divided by the number of points that are visible, which in some batches is zero",
    "nonfinite_gradients",
)
def no_point_is_visible(attach: Attach, wrong: bool, seed: int) -> float:
    places = torch.rand(640, 2)
    axis = torch.linspace(0, 1, 10)
    heat = torch.exp(-40 * ((axis[:, None] - places[:, :1, None]) ** 2 + (axis - places[:, 1:, None]) ** 2))
    visible = (torch.rand(640, 1) < 0.4).float()
    pictures = heat[:, None] + 0.2 * torch.randn(640, 1, 10, 10)
    convolved = nn.Conv2d(1, 8, 3, padding=1)
    model = nn.Sequential(convolved, nn.ReLU(), nn.Flatten(), layers(800, 48, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    for data, place, known in batches(400, 8, pictures[:512], places[:512], visible[:512]):
        missed = ((model(data) - place).square() * known).sum()
        loss = missed / known.sum() if wrong else missed / known.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(pictures[512:]), places[512:]))


@GROUP.mistake(
    "data parallel by hand: the schedule stands among what rank 0 alone does, so other ranks keep the first rate",
    "ranks_diverged learning_rate_off_plan",
    ranks=2,
)
def schedule_on_one_rank(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = layers(8, 48, 48, 1, between=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
    attach(model, optimizer)
    rank = dist.get_rank()
    for data, target in batches(200, 32, inputs[rank:512:2], targets[rank:512:2]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        optimizer.step()
        if rank == 0 or not wrong:
            schedule.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


def blocks(*widths: int, closing: bool) -> nn.Sequential:
    """Linear layers of these widths with a ReLU behind each; the last has one where `closing` says so."""
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts) if closing else nn.Sequential(*parts[:-1])


@GROUP.mistake(
    "a helper puts a ReLU behind every layer, behind the last as well, and standardised targets are often negative",
    "limited_output dead_units",
)
def relu_behind_the_last(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(1280)
    model = blocks(8, 64, 64, 1, closing=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for data, target in batches(500, 32, inputs[:1024], targets[:1024]):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[1024:]), targets[1024:]))
