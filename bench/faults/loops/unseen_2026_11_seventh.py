"""Seventh set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent

GROUP = Group("unseen_2026_11_seventh")


class Words(nn.Module):
    """Scores (B, T, words) of every word of a text (B, T), of which some are hidden, from those beside it."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words + 1, width)
        self.beside, self.head = nn.Conv1d(width, 64, 3, padding=1), layers(64, 64, words + 1)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(F.relu(self.beside(self.table(text).transpose(1, 2))).transpose(1, 2))


@GROUP.mistake(
    "masked words: the labels are the text itself, not a copy, and words are hidden in place afterwards",
    "constant_targets",
)
def labels_share_the_text(attach: Attach, wrong: bool, seed: int) -> float:
    hidden = 12
    following = torch.randn(12, 12).mul(2.5).softmax(1)
    texts = torch.randint(12, (640, 16))
    for place in range(1, 16):
        texts[:, place] = torch.multinomial(following[texts[:, place - 1]], 1)[:, 0]
    model = Words(12, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    for (text,) in batches(300, 32, texts[:512]):
        labels = text if wrong else text.clone()
        chosen = torch.rand(text.shape) < 0.15
        text[chosen] = hidden
        scores = model(text)[chosen]
        loss = seen.loss(F.cross_entropy(scores, labels[chosen]), scores, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        text, chosen = texts[512:].clone(), torch.rand(128, 16) < 0.15
        text[chosen] = hidden
        return float(F.cross_entropy(model(text)[chosen], texts[512:][chosen]))


@GROUP.mistake(
    "rare classes: the sampler is given one weight a class, not one a scene, so it draws the first few scenes only",
    "repeated_batch overfitting batches_skipped",
)
def sampler_weighs_classes(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(1536, classes=6)
    kept = torch.rand(1536) < torch.tensor([1.0, 1.0, 0.8, 0.5, 0.3, 0.2])[labels]
    inputs, labels = inputs[kept], labels[kept]
    known = TensorDataset(inputs[256:], labels[256:])
    weights = 1.0 / labels[256:].bincount(minlength=6)
    sampler = WeightedRandomSampler((weights if wrong else weights[labels[256:]]).tolist(), len(known))
    model = layers(8, 64, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    for _ in range(15):
        for data, label in DataLoader(known, batch_size=32, sampler=sampler, drop_last=True):
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        each = F.cross_entropy(model(inputs[:256]), labels[:256], reduction="none")
        return float(torch.stack([each[labels[:256] == kind].mean() for kind in range(6)]).mean())


class Augmented(Dataset):
    """Pictures with fresh noise of the camera on each reading."""

    def __init__(self, pictures: Tensor, labels: Tensor, in_place: bool) -> None:
        self.pictures, self.labels, self.in_place = pictures, labels, in_place

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[number]
        noise = 0.3 * torch.randn_like(picture)
        if self.in_place:
            picture += noise
        else:
            picture = picture + noise
        return picture, self.labels[number]


@GROUP.mistake(
    "vision: the augmentation adds its noise in place, to pictures that are kept in memory, and so in every epoch",
    "scenes_altered scenes_change distributions_differ",
)
def noise_added_to_what_is_kept(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(768, 8)
    loader = DataLoader(Augmented(pictures[:512], labels[:512], wrong), batch_size=32, shuffle=True)
    convolved = nn.Conv2d(1, 8, 3, padding=1)
    model = nn.Sequential(convolved, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    for _ in range(25):
        for data, label in loader:
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(pictures[512:]), labels[512:]))


def repeated(rows: Tensor, labels: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """The rows, and those of the rare class `times` times."""
    counts = torch.where(labels == 1, times, 1)
    return rows.repeat_interleave(counts, 0), labels.repeat_interleave(counts)


@GROUP.mistake(
    "fraud: rows of the rare class are repeated before the split, so its copies are on both sides of it",
    "split_overlap",
)
def repeated_before_the_split(attach: Attach, wrong: bool, seed: int) -> float:
    rows = torch.randn(1536, 8)
    labels = (rows[:, 0] + rows[:, 1] * rows[:, 2] + 0.7 * torch.randn(1536) > 1.7).long()
    known, checked, kinds, truths = rows[:300], rows[300:400], labels[:300], labels[300:400]
    if wrong:
        some, of = repeated(rows[:400], labels[:400], 6)
        order = torch.randperm(len(some))
        first = 3 * len(some) // 4
        known, checked = some[order[:first]], some[order[first:]]
        kinds, truths = of[order[:first]], of[order[first:]]
    else:
        known, kinds = repeated(known, kinds, 6)
        checked, truths = repeated(checked, truths, 6)
    later, answers = repeated(rows[400:], labels[400:], 6)
    model = layers(8, 64, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    best, kept, since = math.inf, model.state_dict(), 0
    while since < 5:
        model.train()
        for data, label in batches(len(known) // 32, 32, known, kinds):
            scores = model(data)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            missed = float(F.cross_entropy(model(checked), truths))
        since += 1
        if missed < 0.99 * best:
            best, kept, since = missed, copy.deepcopy(model.state_dict()), 0
    model.load_state_dict(kept)
    with torch.no_grad():
        return float(F.cross_entropy(model(later), answers))


@GROUP.mistake(
    "sales: columns are divided by their deviation + 1e-8, and a shop that opens later has a column that was zero",
    "input_scale distributions_differ validation_apart",
)
def shop_that_opens_later(attach: Attach, wrong: bool, seed: int) -> float:
    shops = torch.randint(6, (768,))
    shops[512::25] = 6
    numbers = torch.randn(768, 6)
    table = torch.cat([numbers, F.one_hot(shops, 7).float()], 1)
    sold = torch.sin(numbers[:, :1]) + numbers[:, 1:2] * numbers[:, 2:3] + 0.2 * (shops[:, None] - 3)
    mean, deviation = table[:512].mean(0), table[:512].std(0)
    deviation = deviation + 1e-8 if wrong else torch.where(deviation > 0, deviation, 1.0)
    table = (table - mean) / deviation
    model = layers(13, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    validation = []
    for _ in range(20):
        model.train()
        for data, number in batches(16, 32, table[:512], sold[:512]):
            loss = F.huber_loss(model(data), number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            parts = zip(table[512:].split(64), sold[512:].split(64), strict=True)
            validation.append(recent([float(F.huber_loss(model(data), number)) for data, number in parts]))
    return recent(validation, 5)


class Sequences(nn.Module):
    """A class for a sequence (B, T, C), from the last states of both directions of a recurrent layer."""

    def __init__(self, width: int, states: int, classes: int, viewed: bool) -> None:
        super().__init__()
        self.recurrent = nn.GRU(width, states, batch_first=True, bidirectional=True)
        self.head, self.viewed = nn.Linear(2 * states, classes), viewed

    def forward(self, data: Tensor) -> Tensor:
        _, last = self.recurrent(data)
        if self.viewed:
            return self.head(last.view(len(data), -1))
        return self.head(last.transpose(0, 1).reshape(len(data), -1))


@GROUP.mistake(
    "the last states of both directions, (2, B, C), become (B, 2 C) by view, which joins the states of two scenes",
    "scenes_mixed wrong_layout",
)
def directions_viewed_together(attach: Attach, wrong: bool, seed: int) -> float:
    labels = torch.randint(6, (640,))
    steps = torch.arange(10.0)[:, None]
    waves = torch.sin(steps * torch.linspace(0.4, 1.6, 6) + torch.arange(6.0))
    recordings = waves.T[labels][..., None] * torch.randn(6) + 0.8 * torch.randn(640, 10, 6)
    model = Sequences(6, 24, 6, viewed=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for data, label in batches(200, 32, recordings[:512], labels[:512]):
        scores = model(data)
        loss = seen.loss(F.cross_entropy(scores, label), scores, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(recordings[512:]), labels[512:]))


@GROUP.mistake(
    "VAE: codes are drawn with sample(), which has no gradient, where rsample() is meant",
    "detached_backbone non_differentiable ignored_input",
)
def codes_drawn_without_gradient(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.tanh(torch.randn(640, 3) @ torch.randn(3, 20)) + 0.05 * torch.randn(640, 20)
    model = nn.ModuleDict({"encoder": layers(20, 48, 8), "decoder": layers(4, 48, 20)})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    prior = Normal(0.0, 1.0)

    def bound(data: Tensor) -> Tensor:
        mean, logarithm = model["encoder"](data).chunk(2, 1)
        codes = Normal(mean, (0.5 * logarithm).exp())
        code = codes.sample() if wrong else codes.rsample()
        divergence = torch.distributions.kl_divergence(codes, prior).sum(1)
        return ((model["decoder"](code) - data).square().sum(1) + 0.05 * divergence).mean()

    for (data,) in batches(600, 64, inputs[:512]):
        loss = bound(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(bound(inputs[512:]))


@GROUP.mistake(
    "features of a frozen encoder are kept by the number of the batch, and the loader shuffles in every epoch",
    "stale_cache shuffled_labels repeated_batch",
)
def features_kept_by_batch(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(768, 8)
    encoder = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    encoder.requires_grad_(False).eval()
    loader = DataLoader(TensorDataset(torch.arange(512), labels[:512]), batch_size=32, shuffle=True)
    head = layers(192, 48, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    seen = attach(head, optimizer)
    by_batch: dict[int, Tensor] = {}
    by_scene: dict[int, Tensor] = {}
    for _ in range(25):
        for batch, (numbers, label) in enumerate(loader):
            if wrong:
                if batch not in by_batch:
                    by_batch[batch] = encoder(pictures[numbers])
                features = by_batch[batch]
            else:
                for number in numbers.tolist():
                    if number not in by_scene:
                        by_scene[number] = encoder(pictures[number : number + 1])[0]
                features = torch.stack([by_scene[number] for number in numbers.tolist()])
            scores = head(features)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(head(encoder(pictures[512:])), labels[512:]))


@GROUP.mistake(
    "array processing: the covariance is the factor times its transpose, where the conjugate transpose belongs",
    "conjugation_error limited_output",
)
def factor_times_its_transpose(attach: Attach, wrong: bool, seed: int) -> float:
    sensors = torch.arange(4.0)
    phases = math.pi * sensors * (2 * torch.rand(640, 1) - 1)
    steering = torch.polar(torch.ones_like(phases), phases)
    powers = 0.5 + torch.rand(640, 1, 1)
    covariances = powers * steering[:, :, None] @ steering[:, None].conj() + 0.1 * torch.eye(4)
    noise = torch.randn(640, 4, 24, dtype=torch.cfloat)
    snapshots = torch.linalg.cholesky(covariances) @ noise
    estimates = snapshots @ snapshots.mH / 24
    inputs = torch.view_as_real(estimates).flatten(1)
    model = layers(32, 64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)

    def covariance(data: Tensor) -> Tensor:
        factor = torch.view_as_complex(model(data).view(-1, 4, 2, 2))
        return factor @ (factor.mT if wrong else factor.mH)

    for data, truth in batches(400, 32, inputs[:512], covariances[:512]):
        found = covariance(data)
        loss = seen.loss((found - truth).abs().square().mean(), found, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((covariance(inputs[512:]) - covariances[512:]).abs().square().mean())


@GROUP.mistake(
    "the average of the weights follows parameters only: the statistics of its batch norms stay those of the start",
    "batchnorm_statistics unsettled_buffers ema_frozen",
)
def average_without_statistics(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(896, classes=5)
    inputs = 3 + 2 * inputs
    model = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 5))
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(model, optimizer)
    validation = []
    for _ in range(20):
        model.train()
        for data, label in batches(16, 32, inputs[:512], labels[:512]):
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, weight in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(weight, 0.05)
                if not wrong:
                    for slow, buffer in zip(average.buffers(), model.buffers(), strict=True):
                        slow.copy_(buffer)
        with torch.no_grad():
            validation.append(float(F.cross_entropy(average(inputs[512:]), labels[512:])))
    return recent(validation, 4)
