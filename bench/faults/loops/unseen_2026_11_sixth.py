"""Sixth set of the examination of November 2026: frequent mistakes, by an author who has not seen the rules."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent

GROUP = Group("unseen_2026_11_sixth")


class BothWays(nn.Module):
    """Reads texts (B, T) forwards and backwards, and judges them by the two states that it ends with."""

    def __init__(self, words: int, classes: int, viewed: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 12)
        self.reader = nn.GRU(12, 20, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, classes)
        self.viewed = viewed

    def forward(self, texts: Tensor) -> Tensor:
        _, states = self.reader(self.words(texts))  # (2, B, 20)
        if self.viewed:
            return self.head(states.view(len(texts), -1))
        return self.head(torch.cat([states[0], states[1]], 1))


@GROUP.mistake(
    "sentiment: the last states of a bidirectional GRU, (2, B, H), are brought to (B, 2 H) by view",
    "scenes_mixed wrong_layout",
)
def states_of_two_directions_viewed(attach: Attach, wrong: bool, seed: int) -> float:
    texts = torch.randint(10, (1280, 12))
    labels = ((texts < 2).sum(1) > (texts > 7).sum(1)).long()
    model = BothWays(10, 2, viewed=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for text, label in batches(350, 32, texts[:1024], labels[:1024]):
        outputs = model(text)
        loss = seen.loss(F.cross_entropy(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(texts[1024:]), labels[1024:]))


class Listener(nn.Module):
    """Says of utterances (B, T, 8), the longest first, which of some commands they are."""

    def __init__(self, commands: int) -> None:
        super().__init__()
        self.reader, self.head = nn.GRU(8, 24, batch_first=True), nn.Linear(24, commands)

    def forward(self, sounds: Tensor, lengths: Tensor) -> Tensor:
        _, states = self.reader(pack_padded_sequence(sounds, lengths, batch_first=True))
        return self.head(states[0])


@GROUP.mistake(
    "spoken commands: a batch is sorted by length before it is packed, and its labels are not",
    "shuffled_labels parts_unrelated",
)
def labels_not_sorted_by_length(attach: Attach, wrong: bool, seed: int) -> float:
    labels, lengths = torch.randint(5, (640,)), torch.randint(6, 18, (640,))
    sounds = torch.randn(640, 18, 8)
    sounds[torch.arange(640), :, labels] += 1.0
    sounds *= (torch.arange(18) < lengths[:, None])[..., None]
    model = Listener(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    for sound, length, label in batches(350, 32, sounds[:512], lengths[:512], labels[:512]):
        length, order = length.sort(descending=True)
        loss = F.cross_entropy(model(sound[order], length), label if wrong else label[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    length, order = lengths[512:].sort(descending=True)
    with torch.no_grad():
        return float(F.cross_entropy(model(sounds[512:][order], length), labels[512:][order]))


@GROUP.mistake(
    "vision: the sampler against rare classes is given a weight for each class, where it expects one for each picture",
    "batches_skipped repeated_batch overfitting",
)
def sampler_given_a_weight_a_class(attach: Attach, wrong: bool, seed: int) -> float:
    labels = torch.multinomial(torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0]), 800, replacement=True)
    pictures = 0.5 * torch.randn(800, 1, 8, 8)
    pictures[torch.arange(800), 0, labels] += 1.0
    weights = 1 / labels.bincount(minlength=5).float()
    sampler = WeightedRandomSampler(weights if wrong else weights[labels], num_samples=len(labels))
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=32, sampler=sampler)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for _ in range(24):
        for picture, label in loader:
            outputs = model(picture)
            loss = seen.loss(F.cross_entropy(outputs, label), outputs, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    others = torch.randint(5, (256,))
    pictures = 0.5 * torch.randn(256, 1, 8, 8)
    pictures[torch.arange(256), 0, others] += 1.0
    with torch.no_grad():
        return float(F.cross_entropy(model(pictures), others))


@GROUP.mistake(
    "plankton: the table is sorted by species and the loader does not shuffle, so a batch is of one species",
    "constant_targets distributions_differ part_not_learned",
)
def one_species_after_the_other(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(4608, classes=6)
    order = labels[:4096].argsort(stable=True)
    table = TensorDataset(inputs[:4096][order], labels[:4096][order])
    loader = DataLoader(table, batch_size=32, shuffle=not wrong)
    model = layers(8, 48, 48, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(model, optimizer)
    for _ in range(10):
        for data, label in loader:
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs[4096:]), labels[4096:]))


@GROUP.mistake(
    "vision: pictures are listed folder by folder, and the last fifth of the list, other classes, is the validation",
    "distributions_differ validation_apart",
)
def last_folders_are_validation(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(800, 8)
    pictures = pictures + 0.3 * torch.randn_like(pictures)
    order = labels.argsort(stable=True)
    if not wrong:
        order = order[torch.randperm(800)]
    pictures, labels = pictures[order], labels[order]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    validation = []
    for _ in range(30):
        model.train()
        for data, label in batches(20, 32, pictures[:640], labels[:640]):
            scores = model(data)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            parts = zip(pictures[640:].split(32), labels[640:].split(32), strict=True)
            validation.append(recent([float(F.cross_entropy(model(data), label)) for data, label in parts]))
    return recent(validation, 3)


class Clicks(nn.Module):
    """How likely a user (B,) is to click on an item (B,)."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, 8), nn.Embedding(items, 8)
        self.of_item = nn.Embedding(items, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1) / 8**0.5 + self.of_item(item)[:, 0]


@GROUP.mistake(
    "recommender: the log holds clicks and nothing else, and no items are drawn that were not clicked on",
    "constant_targets",
)
def nothing_but_clicks(attach: Attach, wrong: bool, seed: int) -> float:
    taste, kind = torch.randn(60, 3), torch.randn(80, 3)
    clicked = (taste @ kind.T / 3**0.5 + 0.2 * torch.randn(60, 80)) > 0.9
    log = clicked.nonzero()[torch.randperm(int(clicked.sum()))]
    known = int(0.8 * len(log))
    passed = (~clicked).nonzero()[torch.randperm(int((~clicked).sum()))[: len(log) - known]]
    model = Clicks(60, 80)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    seen = attach(model, optimizer)
    for (pairs,) in batches(1600, 64, log[:known]):
        user, item = pairs.T
        labels = torch.ones(64)
        if not wrong:
            user, item = user.repeat(2), torch.cat([item, torch.randint(80, (64,))])
            labels = torch.cat([labels, torch.zeros(64)])
        outputs = model(user, item)
        loss = seen.loss(F.binary_cross_entropy_with_logits(outputs, labels), outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checked = torch.cat([log[known:], passed])
    labels = torch.cat([torch.ones(len(log) - known), torch.zeros(len(passed))])
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(model(*checked.T), labels))


@GROUP.mistake(
    "segmentation: pictures are divided by 255 into a tensor that zeros_like made, of bytes, where they are all zero",
    "constant_input empty_cache_slot input_scale",
)
def divided_into_bytes(attach: Attach, wrong: bool, seed: int) -> float:
    axis = torch.arange(14)
    at = torch.randint(3, 11, (448, 2, 1))
    masks = ((axis - at[:, 0]).abs() <= 2)[:, None, :, None] & ((axis - at[:, 1]).abs() <= 2)[:, None, None]
    raw = (70 + 80 * masks + 25 * torch.randn(448, 1, 14, 14)).clamp(0, 255).to(torch.uint8)
    masks = masks.float()
    ready = torch.zeros_like(raw) if wrong else torch.zeros(raw.shape)
    for number, picture in enumerate(raw):
        ready[number] = picture / 255
    pictures = ready.float()
    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    for data, mask in batches(700, 16, pictures[:384], masks[:384]):
        loss = F.binary_cross_entropy_with_logits(model(data), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(model(pictures[384:]), masks[384:]))


@GROUP.mistake(
    "detection: headings of boxes are stored in degrees, and sine and cosine, which the head learns, take radians",
    "wrong_units parts_unrelated shuffled_labels",
)
def headings_in_degrees(attach: Attach, wrong: bool, seed: int) -> float:
    headings = torch.randint(360, (640,)).float()
    axis = torch.linspace(-1, 1, 10)
    ways = torch.deg2rad(headings)[:, None, None]
    pictures = torch.tanh(2 * (ways.cos() * axis + ways.sin() * axis[:, None])) + 0.2 * torch.randn(640, 10, 10)
    pictures = pictures[:, None]
    angles = headings if wrong else torch.deg2rad(headings)
    wanted = torch.stack([angles.sin(), angles.cos()], 1)
    first, second = nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 16, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    for data, want in batches(700, 32, pictures[:512], wanted[:512]):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, want), outputs, want)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(pictures[512:]), wanted[512:]))


@GROUP.mistake(
    "clicks in time: seconds since 1970 become float32 before their differences are taken, which are of seconds",
    "inputs_withhold_answer constant_input input_scale",
)
def differences_of_float32_times(attach: Attach, wrong: bool, seed: int) -> float:
    pace, regular = 1 + 9 * torch.rand(2560, 1), torch.rand(2560, 1)
    waits = pace * (regular + (1 - regular) * -torch.rand(2560, 24).clamp(min=1e-3).log())
    times = 1.7e9 + 3e7 * torch.rand(2560, 1, dtype=torch.float64) + waits.double().cumsum(1)
    intervals = times.float().diff(dim=1) if wrong else times.diff(dim=1).float()
    inputs, targets = torch.log1p(intervals), torch.cat([pace / 5 - 1, 2 * regular - 1], 1)
    model = layers(23, 48, 48, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    for data, target in batches(1200, 32, inputs[:2048], targets[:2048]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[2048:]), targets[2048:]))


@GROUP.mistake(
    "fraud: the few frauds are copied five times before the split, so validation has the copies, and stops nothing",
    "split_overlap overfitting",
)
def copied_before_the_split(attach: Attach, wrong: bool, seed: int) -> float:
    way = torch.randn(10) / 10**0.5
    frauds, others = (torch.randn(count, 10) + side * 0.8 * way for count, side in ((400, 1), (1200, -1)))
    parts = {"train": (frauds[:160], others[:800]), "validation": (frauds[160:200], others[800:1000])}
    if wrong:
        copied = frauds[:200].repeat(5, 1)[torch.randperm(1000)]
        parts = {"train": (copied[:800], others[:800]), "validation": (copied[800:], others[800:1000])}
    else:
        parts = {name: (few.repeat(5, 1), many) for name, (few, many) in parts.items()}
    parts["test"] = (frauds[200:], others[1000:])
    inputs = {name: torch.cat(both) for name, both in parts.items()}
    labels = {name: torch.arange(2).repeat_interleave(len(few)) for name, (few, _) in parts.items()}
    model = layers(10, 64, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    attach(model, optimizer)
    best, best_weights, waited = float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(60):
        model.train()
        for data, label in batches(50, 32, inputs["train"], labels["train"]):
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            reached = float(F.cross_entropy(model(inputs["validation"]), labels["validation"]))
        waited += 1
        if reached < best:
            best, best_weights, waited = reached, copy.deepcopy(model.state_dict()), 0
        if waited == 3:
            break
    model.load_state_dict(best_weights)
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs["test"]), labels["test"]))
