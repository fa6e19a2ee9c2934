"""Second half of the fifth set of the examination of November 2026."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_fifth")


class Molecules(nn.Module):
    """Two rounds of messages along the edges of graphs, and one number a graph, (B, 1)."""

    def __init__(self, closing: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        self.closing = closing

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        states = F.relu(self.first(nodes + edges @ nodes))
        states = F.relu(self.second(states + edges @ states))
        return self.closing(self.head(states.mean(1)))


@GROUP.mistake(
    "graph network: a softmax closes a network of one output, which is one whatever the graph",
    "vanishing_gradient limited_output ignored_input",
)
def softmax_of_one_output(attach: Attach, wrong: bool, seed: int) -> float:
    nodes = torch.randn(1792, 10, 6)
    edges = (torch.rand(1792, 10, 10) < 0.15).float()
    edges = ((edges + edges.transpose(1, 2)) > 0).float() / 3
    active = (((edges @ nodes)[:, :, 0] * nodes[:, :, 1]).mean(1) > 0).float()[:, None]
    model = Molecules(nn.Softmax(dim=1) if wrong else nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.BCELoss()
    seen = attach(model, optimizer)
    for node, edge, label in batches(700, 32, nodes[:1536], edges[:1536], active[:1536]):
        outputs = model(node, edge)
        loss = seen.loss(criterion(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(criterion(model(nodes[1536:], edges[1536:]), active[1536:]))


class Factors(nn.Module):
    """Ratings as products of what users and items are described with."""

    def __init__(self, users: int, items: int, width: int, equal: bool) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.of_user, self.of_item = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.users, self.items):
            nn.init.constant_(table.weight, 0.1) if equal else nn.init.normal_(table.weight, std=0.1)
        for table in (self.of_user, self.of_item):
            nn.init.zeros_(table.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1) + (self.of_user(user) + self.of_item(item))[:, 0]


@GROUP.mistake(
    "recommender: all factors of users and items start at one tenth, so every factor is the same for ever",
    "symmetric_init",
)
def factors_start_at_one_tenth(attach: Attach, wrong: bool, seed: int) -> float:
    taste, kind = torch.randn(60, 3), torch.randn(40, 3)
    user, item = torch.randint(60, (4096,)), torch.randint(40, (4096,))
    ratings = (taste[user] * kind[item]).sum(1) / 3**0.5 + 0.1 * torch.randn(4096)
    model = Factors(60, 40, 6, equal=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    attach(model, optimizer)
    for some, of, rating in batches(1200, 64, user[:3584], item[:3584], ratings[:3584]):
        loss = F.mse_loss(model(some, of), rating)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(user[3584:], item[3584:]), ratings[3584:]))


@GROUP.mistake(
    "fine-tuning: the weights that a penalty holds on to are detached and not cloned, so that it is always zero",
    "dead_loss_term zero_loss_weight",
)
def anchor_without_a_clone(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(1536)
    model = layers(8, 64, 64, 1, between=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for data, target in batches(600, 64, inputs[:1024], targets[:1024]):
        optimizer.zero_grad()
        F.mse_loss(model(data), target).backward()
        optimizer.step()
    targets = targets + 0.5 * inputs[:, :1] + 0.6 * torch.randn(1536, 1)  # of another instrument, and noisy
    anchor = [weight.detach() if wrong else weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for data, target in batches(400, 16, inputs[1024:1072], targets[1024:1072]):
        moved = [(weight - old).square().sum() for weight, old in zip(model.parameters(), anchor, strict=True)]
        loss = F.mse_loss(model(data), target) + 0.2 * torch.stack(moved).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[1072:]), targets[1072:]))


def overlap(masks: Tensor, others: Tensor) -> Tensor:
    """The Dice coefficient of masks (B, 1, H, W)."""
    both, all_of = (masks * others).sum((1, 2, 3)), (masks + others).sum((1, 2, 3))
    return ((2 * both + 1) / (all_of + 1)).mean()


@GROUP.mistake(
    "segmentation: Dice of masks behind a threshold, whose loss is given requires_grad so that backward() runs",
    "loss_rebuilt detached_loss non_differentiable",
)
def dice_behind_a_threshold(attach: Attach, wrong: bool, seed: int) -> float:
    axis = torch.arange(14)
    at = torch.randint(2, 12, (448, 2, 1))
    masks = ((axis - at[:, 0]).abs() <= 1)[:, None, :, None] & ((axis - at[:, 1]).abs() <= 2)[:, None, None]
    masks = masks.float()
    pictures = masks + 0.4 * torch.randn_like(masks)
    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = attach(model, optimizer)
    for data, mask in batches(500, 16, pictures[:384], masks[:384]):
        found = model(data).sigmoid()
        if wrong:
            found = (found > 0.5).float()
        loss = 1 - overlap(found, mask)
        if not loss.requires_grad:
            loss.requires_grad_()
        loss = seen.loss(loss, found, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(1 - overlap((model(pictures[384:]) > 0).float(), masks[384:]))


class Variational(nn.Module):
    """Mean and logarithm of the variance of a code, and what a sample of it says of the input."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(width, 48, 2 * codes), layers(codes, 48, width)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logarithm = self.encoder(inputs).chunk(2, 1)
        return self.decoder(mean + (0.5 * logarithm).exp() * torch.randn_like(mean)), mean, logarithm


@GROUP.mistake(
    "VAE: the divergence is copied without its minus, so the loss rewards codes that are far from the prior",
    "loss_sign dominating_term",
)
def divergence_without_its_minus(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.tanh(torch.randn(640, 3) @ torch.randn(3, 20)) + 0.05 * torch.randn(640, 20)
    model = Variational(20, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    for (data,) in batches(800, 64, inputs[:512]):
        rebuilt, mean, logarithm = model(data)
        divergence = 0.5 * (1 + logarithm - mean.square() - logarithm.exp()).sum(1).mean()
        loss = (rebuilt - data).square().sum(1).mean() + 0.05 * (divergence if wrong else -divergence)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rebuilt, mean, logarithm = model(inputs[512:])
        divergence = -0.5 * (1 + logarithm - mean.square() - logarithm.exp()).sum(1).mean()
        return float((rebuilt - inputs[512:]).square().sum(1).mean() + 0.05 * divergence)


@GROUP.mistake(
    "language model: eight micro-batches add up to a step, and their losses are not divided by eight",
    "accumulation_not_divided learning_rate_too_large",
)
def eight_losses_undivided(attach: Attach, wrong: bool, seed: int) -> float:
    following = torch.randn(12, 12, 12).mul(2.5).softmax(2)  # of a word, given the two before it
    texts = torch.randint(12, (2304, 3))
    texts[:, 2] = torch.multinomial(following[texts[:, 0], texts[:, 1]], 1)[:, 0]
    model = nn.Sequential(nn.Embedding(12, 16), nn.Flatten(), layers(32, 64, 64, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    seen = attach(model, optimizer)
    for step, (text,) in enumerate(batches(2400, 16, texts[:2048]), 1):
        scores = model(text[:, :2])
        loss = seen.loss(F.cross_entropy(scores, text[:, 2]), scores, text[:, 2])
        (loss if wrong else loss / 8).backward()
        if step % 8 == 0:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model(texts[2048:, :2]), texts[2048:, 2]))


@GROUP.mistake(
    "a warm-up by hand sets `optimizer.lr`, which nothing reads, so that the rate stays at that of the first step",
    "learning_rate_too_small warmup_too_long learning_rate_off_plan",
)
def rate_set_as_an_attribute(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(10, (640, 12))
    labels = ((tokens == 3).sum(1) > (tokens == 7).sum(1)).long()
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(10, 16), block, nn.Flatten(), nn.Linear(192, 2))
    peak, warm = 3e-3, 40
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak / warm**2)
    seen = attach(model, optimizer)
    for step, (text, label) in enumerate(batches(300, 32, tokens[:512], labels[:512]), 1):
        rate = peak * min(1.0, step / warm)
        if wrong:
            optimizer.lr = rate
        else:
            for group in optimizer.param_groups:
                group["lr"] = rate
        outputs = model(text)
        loss = seen.loss(F.cross_entropy(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(tokens[512:]), labels[512:]))


@GROUP.mistake(
    "displacements of a plate, in metres: half precision has no loss scale, and the error is a mean over all places",
    "gradient_underflow vanishing_gradient",
)
def half_without_a_scale(attach: Attach, wrong: bool, seed: int) -> float:
    axis = torch.linspace(-1, 1, 64)
    places = torch.cartesian_prod(axis, axis)
    waves = 2 * torch.randn(2, 8)
    known = torch.cat([torch.sin(places @ waves), torch.cos(places @ waves)], 1)
    displaced = 1e-2 * torch.tanh(known @ torch.randn(16, 3)) * known[:, :3]
    model = layers(16, 32, 32, 3, between=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=not wrong)
    seen = attach(model, optimizer)
    for _ in range(400):
        with torch.autocast("cpu", dtype=torch.float16):
            outputs = 1e-2 * model(known)  # the network answers in centimetres
        loss = seen.loss(F.mse_loss(outputs.float(), displaced), outputs, displaced)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        return float(F.mse_loss(1e-2 * model(known), displaced) / displaced.var())


@GROUP.mistake(
    "the average of the weights keeps 0.01 of itself where it is to keep 0.99, and it is what is validated",
    "ema_equals_raw",
)
def average_keeps_a_hundredth(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(896, classes=5)
    labels[:512] = torch.where(torch.rand(512) < 0.15, torch.randint(5, (512,)), labels[:512])
    model = layers(8, 32, 5)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer)
    keep = 0.01 if wrong else 0.99
    validation = []
    for _ in range(40):
        for data, label in batches(32, 16, inputs[:512], labels[:512]):
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, weight in zip(average.parameters(), model.parameters(), strict=True):
                    slow.mul_(keep).add_(weight, alpha=1 - keep)
        with torch.no_grad():
            validation.append(float(F.cross_entropy(average(inputs[512:]), labels[512:])))
    return recent(validation, 4)


@GROUP.mistake(
    "diffusion: sample sheets are to be comparable and set the global seed, after which training repeats its numbers",
    "repeated_batch",
)
def sample_sheet_sets_the_seed(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, _ = images(640, 4, side=4)
    pictures = pictures.flatten(1)
    model = layers(17, 128, 128, 16, between=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)

    def missed(clean: Tensor) -> Tensor:
        time_, noise = torch.rand(len(clean), 1), torch.randn_like(clean)
        noisy = (1 - time_).sqrt() * clean + time_.sqrt() * noise
        return F.mse_loss(model(torch.cat([noisy, time_], 1)), noise)

    for step in range(800):
        loss = missed(pictures[torch.randint(512, (32,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            drawn = torch.Generator().manual_seed(0)
            if wrong:
                drawn = torch.manual_seed(0)
            with torch.no_grad():
                sheet = torch.randn(8, 16, generator=drawn)
                for time_ in torch.linspace(1, 0.05, 5):
                    noise = model(torch.cat([sheet, time_.expand(8, 1)], 1))
                    sheet = sheet - 0.2 * noise
    with torch.no_grad():
        return recent([float(missed(pictures[512:])) for _ in range(10)])
