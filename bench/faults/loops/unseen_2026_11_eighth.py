"""Eighth set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, layers, recent, surface

GROUP = Group("unseen_2026_11_eighth")


class Reader(nn.Module):
    """Recurrent network that reads frames (B, T, F) in both directions and answers with (B, classes)."""

    def __init__(self, features: int, classes: int, viewed: bool) -> None:
        super().__init__()
        self.cells = nn.GRU(features, 20, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, classes)
        self.viewed = viewed

    def forward(self, frames: Tensor) -> Tensor:
        _, last = self.cells(frames)  # (2, B, 20)
        both = last.view(len(frames), -1) if self.viewed else last.transpose(0, 1).reshape(len(frames), -1)
        return self.head(both)


@GROUP.mistake(
    "speech: the last states of a bidirectional GRU, (2, B, H), become (B, 2 H) by view, which mixes recordings",
    "scenes_mixed wrong_layout",
)
def last_states_viewed(attach: Attach, wrong: bool, seed: int) -> float:
    labels = torch.randint(6, (640,))
    words = torch.randn(6, 3, 8)
    starts = torch.randint(9, (640,))
    frames = 0.5 * torch.randn(640, 12, 8)
    for step in range(3):
        frames[torch.arange(640), starts + step] += words[labels, step]
    model = Reader(8, 6, viewed=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.CrossEntropyLoss()
    seen = attach(model, optimizer)
    for data, label in batches(250, 32, frames[:512], labels[:512]):
        scores = model(data)
        loss = seen.loss(criterion(scores, label), scores, label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        return float(criterion(model(frames[512:]), labels[512:]))


class Positions(nn.Module):
    """Sines and cosines of the position, as in the tutorial of every transformer: (longest, 1, width)."""

    def __init__(self, width: int, longest: int, batch_first: bool) -> None:
        super().__init__()
        angles = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("table", torch.stack([angles.sin(), angles.cos()], 2).view(longest, 1, width))
        self.batch_first = batch_first

    def forward(self, states: Tensor) -> Tensor:
        table = self.table.transpose(0, 1)[:, : states.shape[1]] if self.batch_first else self.table[: len(states)]
        return states + table


class Sorter(nn.Module):
    """One layer of a transformer over words (B, T): scores of a word at every place, (B, T, words)."""

    def __init__(self, words: int, width: int, batch_first: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), Positions(width, 64, batch_first)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.layer(self.positions(self.words(text))))


@GROUP.mistake(
    "language: positions are added along the first axis, as for (T, B, D), and the batch comes first",
    "wrong_layout scenes_mixed inputs_withhold_answer",
)
def positions_along_the_batch(attach: Attach, wrong: bool, seed: int) -> float:
    model = Sorter(10, 32, batch_first=not wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        text = torch.randint(10, (32, 8))
        backwards = text.flip(1)
        scores = model(text).flatten(0, 1)
        loss = seen.loss(F.cross_entropy(scores, backwards.flatten()), scores, backwards.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "fine-tuning: the learning rate is to fall by a factor a layer, and is multiplied by it at every tensor",
    "learning_rate_too_small zero_learning_rate",
)
def rate_falls_with_every_tensor(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(1280)
    parts = [nn.Sequential(nn.Linear(8 if k == 0 else 48, 48), nn.LayerNorm(48), nn.GELU()) for k in range(4)]
    model = nn.Sequential(*parts, nn.Linear(48, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for data, target in batches(150, 64, inputs, targets):
        optimizer.zero_grad()
        F.mse_loss(model(data), target).backward()
        optimizer.step()
    targets = targets + inputs[:, :1] * inputs[:, 1:2]  # of the new task
    groups, rate = [], 2e-3
    for part in reversed(model):
        for weight in part.parameters():
            groups.append({"params": [weight], "lr": rate})
            if wrong:
                rate *= 0.5
        if not wrong:
            rate *= 0.5
    optimizer = torch.optim.Adam(groups)
    attach(model, optimizer)
    for data, target in batches(400, 32, inputs[:1024], targets[:1024]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[1024:]), targets[1024:]))


@GROUP.mistake(
    "translation: the schedule of the transformer's paper warms up for 4000 steps, and the run has 300",
    "warmup_too_long learning_rate_too_small",
)
def warm_up_of_the_paper(attach: Attach, wrong: bool, seed: int) -> float:
    warm_up = 4000 if wrong else 40
    table = torch.randint(12, (12, 12))
    model = Sorter(12, 32, batch_first=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.15 * 32**-0.5 * min((step + 1) ** -0.5, (step + 1) * warm_up**-1.5)
    )
    attach(model, optimizer)
    losses = []
    for _ in range(300):
        source = torch.randint(12, (32, 8))
        target = table[source, source.roll(1, 1)]
        loss = F.cross_entropy(model(source).transpose(1, 2), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return recent(losses, 20)


@GROUP.mistake(
    "medicine: the rare disease is repeated to balance the classes before the cases are split",
    "split_overlap overfitting",
)
def balanced_before_the_split(attach: Attach, wrong: bool, seed: int) -> float:
    known, unknown = torch.randn(320, 20), torch.randn(2000, 20)
    direction = torch.randn(20) / 3
    ill = [(cases @ direction + 0.7 * torch.randn(len(cases)) > 1.3).float()[:, None] for cases in (known, unknown)]

    def balanced(cases: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rare = labels[:, 0].nonzero()[:, 0]
        often = torch.cat([torch.arange(len(cases)), rare.repeat(len(cases) // max(1, len(rare)) - 2)])
        often = often[torch.randperm(len(often))]
        return cases[often], labels[often]

    data, labels = balanced(known, ill[0]) if wrong else (known, ill[0])
    cut = 4 * len(data) // 5
    train, checked = (data[:cut], labels[:cut]), (data[cut:], labels[cut:])
    if not wrong:
        train, checked = balanced(*train), balanced(*checked)
    model = layers(20, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    criterion = nn.BCEWithLogitsLoss()
    seen = attach(model, optimizer)
    best, kept = math.inf, {}
    for _ in range(40):
        model.train()
        for cases, label in batches(12, 32, *train):
            outputs = model(cases)
            loss = seen.loss(criterion(outputs, label), outputs, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found = float(criterion(model(checked[0]), checked[1]))
        if found < best:
            best, kept = found, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    with torch.no_grad():
        return float(criterion(model(unknown), ill[1]))


class Recordings(Dataset):
    """Recordings that get some noise each time they are read."""

    def __init__(self, recordings: Tensor, labels: Tensor, in_place: bool) -> None:
        self.recordings, self.labels, self.in_place = recordings, labels, in_place

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        recording = self.recordings[index]
        noise = 0.6 * torch.randn_like(recording)
        if self.in_place:
            recording += noise
        else:
            recording = recording + noise
        return recording, self.labels[index]


@GROUP.mistake(
    "speech: augmentation adds its noise in place, so the recordings in memory get noisier in every epoch",
    "scenes_change scenes_altered distributions_differ",
)
def noise_stays_in_memory(attach: Attach, wrong: bool, seed: int) -> float:
    sounds = torch.randn(6, 40)
    labels = torch.randint(6, (384,))
    recordings = sounds[labels] * (0.5 + torch.rand(384, 1)) + 1.2 * torch.randn(384, 40)
    known = recordings[:256].clone()
    loader = DataLoader(Recordings(known, labels[:256], in_place=wrong), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, optimizer)
    validation = []
    for _ in range(60):
        model.train()
        for data, label in loader:
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            validation.append(float(F.cross_entropy(model(recordings[256:]), labels[256:])))
    return recent(validation, 5)


@GROUP.mistake(
    "physics-informed: the equation has a second derivative, and that of a network of ReLUs is zero everywhere",
    "dead_loss_term vanishing_gradient non_differentiable",
)
def second_derivative_of_relus(attach: Attach, wrong: bool, seed: int) -> float:
    frequency = 3.0 + torch.rand(1)
    model = layers(1, 48, 48, 1, between=nn.ReLU if wrong else nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    ends = torch.tensor([[-1.0], [1.0]])
    for _ in range(600):
        places = (2 * torch.rand(64, 1) - 1).requires_grad_()
        values = model(places)
        (slope,) = torch.autograd.grad(values.sum(), places, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), places, create_graph=True, allow_unused=True)
        bend = torch.zeros_like(places) if bend is None else bend
        residual = bend / frequency**2 + torch.sin(frequency * places)
        loss = residual.square().mean() + 10 * F.mse_loss(model(ends), torch.sin(frequency * ends))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        places = torch.linspace(-1, 1, 201)[:, None]
        return float(F.mse_loss(model(places), torch.sin(frequency * places)))


@GROUP.mistake(
    "wireless: the covariance of the snapshots is made with a transpose, so that the symbols' phases remain in it",
    "conjugation_error inputs_withhold_answer",
)
def covariance_without_conjugate(attach: Attach, wrong: bool, seed: int) -> float:
    def scenes(size: int) -> tuple[Tensor, Tensor]:
        angles = 2 * torch.rand(size, 1) - 1
        steering = torch.exp(1j * math.pi * 0.8 * torch.arange(6) * angles)
        symbols = torch.randn(size, 1, 48, dtype=torch.complex64)
        snapshots = steering[:, :, None] * symbols + 0.7 * torch.randn(size, 6, 48, dtype=torch.complex64)
        other = snapshots.transpose(1, 2) if wrong else snapshots.mH
        return torch.view_as_real(snapshots @ other / 48).flatten(1), angles

    model = layers(72, 96, 96, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(400):
        covariances, angles = scenes(64)
        outputs = model(covariances)
        loss = seen.loss(F.mse_loss(outputs, angles), outputs, angles)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 40)


class Matcher(nn.Module):
    """Scores (B,) of users and items from their vectors."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1)


@GROUP.mistake(
    "recommender: AdamW(parameters, rate, betas, 0.01) is meant to decay weights, and the fourth argument is epsilon",
    "epsilon_swallows_signal learning_rate_too_small",
)
def decay_given_as_epsilon(attach: Attach, wrong: bool, seed: int) -> float:
    taste, kind = torch.randn(50, 4), torch.randn(40, 4)
    user, item = torch.randint(50, (4096,)), torch.randint(40, (4096,))
    bought = torch.bernoulli(torch.sigmoid(2 * (taste[user] * kind[item]).sum(1)))
    model = Matcher(50, 40, 8)
    if wrong:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.999), 0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.999), weight_decay=0.01)
    seen = attach(model, optimizer)
    for some, of, target in batches(350, 128, user[:3584], item[:3584], bought[:3584]):
        scores = model(some, of)
        loss = seen.loss(F.binary_cross_entropy_with_logits(scores, target), scores, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(model(user[3584:], item[3584:]), bought[3584:]))


@GROUP.mistake(
    "robots: the yaw of a pose is stored in degrees, and its sine and cosine are taken as if it were in radians",
    "wrong_units parts_unrelated",
)
def sine_of_degrees(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, turns = surface(768)
    degrees = 60 * turns
    marks = torch.randn(5, 2)
    turned = torch.deg2rad(degrees)
    rotation = torch.stack([turned.cos(), -turned.sin(), turned.sin(), turned.cos()], 2).view(-1, 2, 2)
    views = torch.cat([(marks @ rotation).flatten(1), 0.3 * inputs], 1) + 0.05 * torch.randn(768, 18)
    yaw = degrees if wrong else torch.deg2rad(degrees)
    poses = torch.cat([yaw.sin(), yaw.cos()], 1)
    model = layers(18, 64, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for view, pose in batches(400, 32, views[:640], poses[:640]):
        outputs = model(view)
        loss = seen.loss(F.smooth_l1_loss(outputs, pose), outputs, pose)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.smooth_l1_loss(model(views[640:]), poses[640:]))
