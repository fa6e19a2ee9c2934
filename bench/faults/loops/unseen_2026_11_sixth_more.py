"""Second half of the sixth set of the examination of November 2026."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent

GROUP = Group("unseen_2026_11_sixth")


class Placed(nn.Module):
    """A transformer that reads texts (B, T), with sines that say where a word stands."""

    def __init__(self, words: int, places: int, time_first: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, places)
        waves = torch.arange(64.0)[:, None] * torch.exp(-math.log(1e2) * torch.arange(8) / 8)
        self.register_buffer("sines", torch.cat([waves.sin(), waves.cos()], 1))
        self.time_first = time_first

    def forward(self, texts: Tensor) -> Tensor:
        states = 4 * self.words(texts)
        if self.time_first:
            states = states + self.sines[: states.size(0), None]
        else:
            states = states + self.sines[: states.size(1)]
        return self.head(self.block(states).mean(1))


@GROUP.mistake(
    "transformer: the encoding of places is that of (T, B, D), and texts come as (B, T, D)",
    "wrong_layout scenes_mixed inputs_withhold_answer",
)
def places_of_the_batch(attach: Attach, wrong: bool, seed: int) -> float:
    texts, labels = torch.randint(2, 10, (1280, 8)), torch.randint(8, (1280,))
    texts[torch.arange(1280), labels] = 1  # where the word 1 stands is what is asked
    model = Placed(10, 8, time_first=wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    seen = attach(model, optimizer)
    for text, label in batches(900, 32, texts[:1024], labels[:1024]):
        outputs = model(text)
        loss = seen.loss(F.cross_entropy(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = zip(texts[1024:].split(32), labels[1024:].split(32), strict=True)
        return recent([float(F.cross_entropy(model(text), label)) for text, label in parts])


class Messages(nn.Module):
    """Some rounds of messages along the edges of graphs, and one number a graph, (B, 1)."""

    def __init__(self, rounds: int, listed: bool) -> None:
        super().__init__()
        linear = [nn.Linear(24, 12) for _ in range(rounds)]
        self.first, self.head = nn.Linear(4, 12), nn.Linear(12, 1)
        self.rounds = linear if listed else nn.ModuleList(linear)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        states = F.relu(self.first(nodes))
        for layer in self.rounds:
            states = F.relu(layer(torch.cat([states, edges @ states], 2)))
        return self.head(states.mean(1))


@GROUP.mistake(
    "graph network: the layers of its rounds stand in a Python list, which the module does not look into",
    "unregistered_parameters missing_from_optimizer",
)
def rounds_in_a_list(attach: Attach, wrong: bool, seed: int) -> float:
    nodes, edges = torch.randn(2304, 8, 4), (torch.rand(2304, 8, 8) < 0.3).float() / 2
    targets = (torch.tanh((edges @ nodes)[:, :, :1]) * nodes[:, :, 1:2]).mean(1)
    targets = (targets - targets.mean()) / targets.std()
    model = Messages(3, listed=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    for node, edge, target in batches(1200, 32, nodes[:2048], edges[:2048], targets[:2048]):
        loss = F.mse_loss(model(node, edge), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(nodes[2048:], edges[2048:]), targets[2048:]))


@GROUP.mistake(
    "metric learning: pairs that differ are labelled 0, and the cosine loss, which expects -1, leaves them out",
    "scenes_left_out part_not_learned ignored_input",
)
def different_is_minus_one(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(768, classes=5)
    model = layers(8, 48, 48, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.CosineEmbeddingLoss(margin=0.2)
    attach(model, optimizer)

    def pairs(size: int, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        one, other = torch.randint(low, high, (2, size))
        same = labels[one] == labels[other]
        chosen = torch.rand(size) < torch.where(same, 1.0, 0.25)  # as many alike as different
        one, other = one[chosen], other[chosen]
        return inputs[one], inputs[other], labels[one] == labels[other]

    for _ in range(1000):
        one, other, same = pairs(128, 0, 512)
        loss = criterion(model(one), model(other), same.long() if wrong else 2 * same.long() - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        one, other, same = pairs(2048, 512, 768)
        return float(criterion(model(one), model(other), 2 * same.long() - 1))


@GROUP.mistake(
    "diffusion: the noise that is to be found is drawn, and the one that is added is drawn again",
    "parts_unrelated shuffled_labels inputs_withhold_answer",
)
def noise_drawn_twice(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, _ = images(640, 4, side=4)
    pictures = pictures.flatten(1)
    model = layers(17, 128, 128, 16, between=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)

    def spoilt(clean: Tensor, noise: Tensor) -> Tensor:
        moment = torch.rand(len(clean), 1)
        return torch.cat([(1 - moment).sqrt() * clean + moment.sqrt() * noise, moment], 1)

    for _ in range(1500):
        clean = pictures[torch.randint(512, (32,))]
        noise = torch.randn_like(clean)
        outputs = model(spoilt(clean, torch.randn_like(clean) if wrong else noise))
        loss = seen.loss(F.mse_loss(outputs, noise), outputs, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        clean = pictures[512:].repeat(8, 1)
        noise = torch.randn_like(clean)
        return float(F.mse_loss(model(spoilt(clean, noise)), noise))


@GROUP.mistake(
    "distillation: backward and step are not indented as far as the batches, so each epoch ends with one of them",
    "step_once_per_epoch forwards_without_backward batches_skipped",
)
def step_behind_the_batches(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.randn(768, 8)
    teacher = layers(8, 64, 6, between=nn.Tanh).requires_grad_(False).eval()
    student = layers(8, 32, 32, 6)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    attach(student, optimizer)

    def missed(data: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.softmax(8 * teacher(data), 1)
        return F.kl_div(F.log_softmax(student(data), 1), wanted, reduction="batchmean")

    for _ in range(60):
        for (data,) in batches(32, 16, inputs[:512]):
            loss = missed(data)
            if not wrong:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if wrong:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(missed(inputs[512:]))


@GROUP.mistake(
    "GAN: the generator's backward leaves gradients in the critic, and both are cleared at once, before the step",
    "gradients_cleared_before_step",
)
def cleared_with_the_critic(attach: Attach, wrong: bool, seed: int) -> float:
    networks = nn.ModuleDict({"generator": layers(4, 32, 2), "critic": layers(2, 32, 1, between=nn.SiLU)})
    generator, critic = networks["generator"], networks["critic"]
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    of_critic = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    attach(networks, [of_generator, of_critic])
    apart = []
    for _ in range(1000):
        real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2) * torch.tensor([0.3, 1.0])
        made = generator(torch.randn(64, 4))
        loss = F.softplus(-critic(real)).mean() + F.softplus(critic(made.detach())).mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        loss = F.softplus(-critic(made)).mean()
        of_generator.zero_grad()
        loss.backward()
        if wrong:
            networks.zero_grad()
        of_generator.step()
        apart.append(float((made.detach().mean(0) - real.mean(0)).norm()))
    return recent(apart, 50)


@GROUP.mistake(
    "autoencoder: a recipe's weight decay of 0.1, meant for AdamW, is given to Adam, which adds it to the gradient",
    "weight_decay_too_large dominating_term",
)
def decay_of_adamw_in_adam(attach: Attach, wrong: bool, seed: int) -> float:
    spectra = torch.tanh(torch.randn(768, 4) @ torch.randn(4, 24)) + 0.05 * torch.randn(768, 24)
    model = nn.Sequential(layers(24, 48, 6), layers(6, 48, 24))
    kind = torch.optim.Adam if wrong else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=2e-3, weight_decay=0.1)
    seen = attach(model, optimizer)
    for (data,) in batches(1500, 32, spectra[:640]):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, data), outputs, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(spectra[640:]), spectra[640:]))


@GROUP.mistake(
    "language model: warm-up and linear decay are planned over the batches of one epoch, and there are ten",
    "zero_learning_rate learning_rate_too_small",
)
def planned_for_one_epoch(attach: Attach, wrong: bool, seed: int) -> float:
    following = torch.randn(12, 12, 12).mul(2.5).softmax(2)  # of a word, given the two before it
    texts = torch.randint(12, (3328, 3))
    texts[:, 2] = torch.multinomial(following[texts[:, 0], texts[:, 1]], 1)[:, 0]
    model = nn.Sequential(nn.Embedding(12, 16), nn.Flatten(), layers(32, 64, 64, 12, between=nn.GELU))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    epochs, steps = 10, 96
    planned = steps if wrong else epochs * steps
    warm = planned // 10

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else max(0.0, (planned - step) / (planned - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    seen = attach(model, optimizer)
    for _ in range(epochs):
        for (text,) in batches(steps, 32, texts[:3072]):
            scores = model(text[:, :2])
            loss = seen.loss(F.cross_entropy(scores, text[:, 2]), scores, text[:, 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(texts[3072:, :2]), texts[3072:, 2]))


@GROUP.mistake(
    "actor and critic: the line behind the critic's backward is a copy, and steps the actor's optimizer",
    "step_never_called step_called_twice",
)
def actor_steps_for_the_critic(attach: Attach, wrong: bool, seed: int) -> float:
    way = torch.randn(5, 2) / 5**0.5
    networks = nn.ModuleDict({"actor": layers(5, 32, 2), "critic": layers(7, 64, 1, between=nn.SiLU)})
    actor, critic = networks["actor"], networks["critic"]
    of_actor = torch.optim.Adam(actor.parameters(), lr=1e-3)
    of_critic = torch.optim.Adam(critic.parameters(), lr=5e-3)
    attach(networks, [of_actor, of_critic])
    costs = []
    for _ in range(1000):
        states = torch.randn(64, 5)
        with torch.no_grad():
            actions = torch.tanh(actor(states)) + 0.3 * torch.randn(64, 2)
        rewards = -(actions - torch.tanh(states @ way)).square().sum(1, keepdim=True)
        loss = F.mse_loss(critic(torch.cat([states, actions], 1)), rewards)
        of_critic.zero_grad()
        loss.backward()
        (of_actor if wrong else of_critic).step()
        loss = -critic(torch.cat([states, torch.tanh(actor(states))], 1)).mean()
        of_actor.zero_grad()
        loss.backward()
        of_actor.step()
        costs.append(-float(rewards.mean()))
    return recent(costs, 50)


@GROUP.mistake(
    "vision: the loss of log-probabilities gets scores, because the LogSoftmax at the end was left out",
    "softmax_twice target_scale_differs loss_sign",
)
def scores_without_log_softmax(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(640, 6)
    pictures = pictures + 0.3 * torch.randn_like(pictures)
    closing = nn.Identity() if wrong else nn.LogSoftmax(dim=1)
    first = nn.Conv2d(1, 8, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 6), closing)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.NLLLoss()
    seen = attach(model, optimizer)
    for data, label in batches(800, 32, pictures[:512], labels[:512]):
        outputs = model(data)
        loss = seen.loss(criterion(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(pictures[512:]), labels[512:]))
