"""Second half of the fourth set of the examination of November 2026."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_fourth")


@GROUP.mistake("vision: bytes become numbers up to 1, and the loop divides them by 255 again", "input_scale")
def divided_by_255_twice(attach: Attach, wrong: bool, seed: int) -> float:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        pictures, labels = images(32, 8)
        pictures = (90 + 90 * pictures).clamp(0, 255).to(torch.uint8).float() / 255
        if wrong:
            pictures = pictures / 255
        outputs = model(pictures)
        loss = seen.loss(F.cross_entropy(outputs, labels), outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 20)


def outlined(count: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 12, 12) with a bright rectangle in noise, and its mask."""
    masks = torch.zeros(count, 1, 12, 12)
    for mask in masks:
        top, left = torch.randint(8, (2,)).tolist()
        mask[0, top : top + 4, left : left + 5] = 1.0
    return masks + 0.4 * torch.randn_like(masks), masks


def segmenter() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)
    )


@GROUP.mistake(
    "segmentation: picture and mask go through random flips one after the other, each with its own draw",
    "parts_unrelated shuffled_labels",
)
def flipped_apart(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, masks = outlined(320)
    model = segmenter()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for picture, mask in batches(250, 16, pictures[:256], masks[:256]):
        first = torch.rand(16, 1, 1, 1) < 0.5
        second = torch.rand(16, 1, 1, 1) < 0.5 if wrong else first
        picture = torch.where(first, picture.flip(3), picture)
        mask = torch.where(second, mask.flip(3), mask)
        outputs = model(picture)
        loss = seen.loss(F.binary_cross_entropy_with_logits(outputs, mask), outputs, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(model(pictures[256:]), masks[256:]))


@GROUP.mistake(
    "uncertainty: the variance is what a ReLU leaves, and its logarithm is taken without an epsilon",
    "nonfinite_gradients",
)
def variance_of_a_relu(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    targets = targets + 0.3 * torch.randn_like(targets) * inputs[:, :1].exp().clamp(max=3)
    model = layers(8, 48, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)

    def missed(data: Tensor, target: Tensor) -> Tensor:
        mean, spread = model(data).chunk(2, 1)
        variance = F.relu(spread) if wrong else F.softplus(spread) + 1e-3
        return 0.5 * (variance.log() + (target - mean).square() / variance).mean()

    for data, target in batches(300, 32, inputs[:512], targets[:512]):
        loss = missed(data, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(missed(inputs[512:], targets[512:]).exp())


@GROUP.mistake(
    "the squares of all weights are added to the loss with a factor of 0.1, which was to be that of their mean",
    "dominating_term weight_decay_too_large",
)
def penalty_on_the_sum(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = layers(8, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    count = sum(weight.numel() for weight in model.parameters())
    for data, target in batches(300, 32, inputs[:512], targets[:512]):
        squares = sum(weight.square().sum() for weight in model.parameters())
        loss = F.mse_loss(model(data), target) + 0.1 * (squares if wrong else squares / count)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


class Convolution(nn.Module):
    """Two graph convolutions with dropout over one graph (nodes, nodes)."""

    def __init__(self, links: Tensor, rate: float) -> None:
        super().__init__()
        self.register_buffer("links", links)
        self.first, self.second, self.drop = nn.Linear(8, 32), nn.Linear(32, 4), nn.Dropout(rate)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = self.drop(F.relu(self.links @ self.first(self.drop(nodes))))
        return self.links @ self.second(hidden)


@GROUP.mistake(
    "graph network: dropout is given the share that is to be kept, 0.95, as in another framework", "heavy_dropout"
)
def dropout_of_what_is_kept(attach: Attach, wrong: bool, seed: int) -> float:
    nodes, labels = blobs(300)
    linked = (labels[:, None] == labels) & (torch.rand(300, 300) < 0.01) | (torch.rand(300, 300) < 0.003)
    links = (linked | linked.T).float() + torch.eye(300)
    shares = links.sum(1).rsqrt()
    model = Convolution(shares[:, None] * links * shares, 0.95 if wrong else 0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    known = torch.arange(300) < 120
    seen = attach(model, optimizer)
    for _ in range(150):
        model.train()
        scores = model(nodes)[known]
        loss = seen.loss(F.cross_entropy(scores, labels[known]), scores, labels[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(nodes)[~known], labels[~known]))


class Fused(nn.Module):
    """A picture's features beside a row of numbers, which numpy joins or torch."""

    def __init__(self, in_numpy: bool) -> None:
        super().__init__()
        self.pictures = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8))
        self.numbers, self.head = nn.Linear(4, 4), nn.Linear(12, 8)
        self.in_numpy = in_numpy

    def forward(self, pictures: Tensor, numbers: Tensor) -> Tensor:
        features = self.pictures(pictures)
        if self.in_numpy:
            features = torch.from_numpy(features.detach().numpy())
        return self.head(F.relu(torch.cat([features, self.numbers(numbers)], 1)))


@GROUP.mistake("two inputs: the features of the picture go through numpy on their way to the head", "detached_backbone")
def features_through_numpy(attach: Attach, wrong: bool, seed: int) -> float:
    model = Fused(in_numpy=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        pictures, labels = images(32, 8)
        numbers = torch.randn(32, 4) + labels[:, None] % 2
        scores = model(pictures, numbers)
        loss = seen.loss(F.cross_entropy(scores, labels), scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 20)


@GROUP.mistake(
    "diffusion: an average with decay 0.9999, as of runs of a million steps, is validated after 400", "ema_cold"
)
def average_too_slow_for_the_run(attach: Attach, wrong: bool, seed: int) -> float:
    model = layers(3, 64, 64, 2, between=nn.SiLU)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    decay = 0.9999 if wrong else 0.98

    def missed(network: nn.Module, count: int) -> Tensor:
        clean = torch.tensor([1.0, -1.0])[torch.randint(2, (count, 2))] + 0.1 * torch.randn(count, 2)
        time, noise = torch.rand(count, 1), torch.randn(count, 2)
        noisy = (1 - time).sqrt() * clean + time.sqrt() * noise
        return F.mse_loss(network(torch.cat([noisy, time], 1)), noise)

    for _ in range(400):
        loss = missed(model, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.lerp_(weight, 1 - decay)
    average.eval()
    with torch.no_grad():
        return float(missed(average, 2048))


@GROUP.mistake(
    "the whole network is cast to bfloat16 to save memory, weights of the optimizer included",
    "low_precision_weights step_without_effect",
)
def weights_cast_to_bfloat16(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = layers(8, 64, 64, 1, between=nn.SiLU)
    kind = torch.bfloat16 if wrong else torch.float32
    model.to(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    attach(model, optimizer)
    for data, target in batches(800, 32, inputs[:512], targets[:512]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(data.to(kind))
        loss = F.mse_loss(outputs.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:].to(kind)).float(), targets[512:]))


class Proxies(nn.Module):
    """A loss with weights of its own: one direction a class, at which the codes of the class are to point."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(classes, width))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(8.0 * F.normalize(codes, dim=1) @ F.normalize(self.directions, dim=1).T, labels)


@GROUP.mistake(
    "metric learning: the loss has a direction for every class, and the optimizer gets the network's weights alone",
    "missing_from_optimizer unregistered_parameters",
)
def proxies_without_optimizer(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(1280, classes=10)
    model, criterion = layers(8, 4), Proxies(10, 4)
    trained = [*model.parameters()] if wrong else [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    attach(model, optimizer)
    for data, label in batches(250, 64, inputs[:1024], labels[:1024]):
        loss = criterion(model(data), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(criterion(model(inputs[1024:]), labels[1024:]))


class Deep(nn.Module):
    """Five layers of tanh between two of another kind, their weights drawn with this standard deviation or torch's."""

    def __init__(self, deviation: float | None) -> None:
        super().__init__()
        self.layers = layers(8, 48, 48, 48, 48, 1, between=nn.Tanh)
        for layer in self.layers:
            if isinstance(layer, nn.Linear) and deviation is not None:
                nn.init.normal_(layer.weight, std=deviation)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@GROUP.mistake(
    "all weights are drawn with nn.init.normal_, whose standard deviation is 1 where it is not said",
    "bad_initialisation",
)
def weights_of_deviation_one(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = Deep(1.0 if wrong else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = attach(model, optimizer)
    for data, target in batches(300, 32, inputs[:512], targets[:512]):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))
