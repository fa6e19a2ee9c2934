"""Fifth set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, layers, recent, surface

GROUP = Group("unseen_2026_11_fifth")


def coloured(size: int, side: int = 12) -> tuple[Tensor, Tensor]:
    """Pictures (size, side, side, 3) with a small bar somewhere, and labels (size,): its colour and its direction."""
    labels = torch.randint(6, (size,))
    pictures = 0.5 * torch.randn(size, side, side, 3)
    rows, columns = torch.randint(side - 4, (2, size))
    every = torch.arange(size)
    for offset in range(4):
        down = labels >= 3
        pictures[every, rows + offset * down, columns + offset * ~down, labels % 3] += 1.5
    return pictures, labels


@GROUP.mistake(
    "vision: pictures with the channel last are brought to (3, H, W) by view, not by permute", "wrong_layout"
)
def channels_viewed_first(attach: Attach, wrong: bool, seed: int) -> float:
    first, second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        pictures, labels = coloured(32)
        pictures = pictures.view(-1, 3, 12, 12) if wrong else pictures.permute(0, 3, 1, 2)
        outputs = model(pictures)
        loss = seen.loss(F.cross_entropy(outputs, labels), outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "electrocardiograms: recordings are read by number, rates by sorted file name, where 10 comes before 2",
    "shuffled_labels parts_unrelated",
)
def rates_in_the_order_of_names(attach: Attach, wrong: bool, seed: int) -> float:
    rates = 1.0 + 3.0 * torch.rand(640, 1)
    moments = torch.linspace(0, 4, 96)
    recordings = torch.sin(6.283 * (rates * moments + torch.rand(640, 1))) ** 9 + 0.2 * torch.randn(640, 96)
    files = [f"recording{number}.pt" for number in range(512)]
    order = sorted(range(512), key=lambda number: files[number] if wrong else number)
    known = rates[:512][torch.tensor(order)]
    first, second = nn.Conv1d(1, 12, 9, stride=2), nn.Conv1d(12, 24, 9, stride=2)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(24 * 18, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for data, rate in batches(500, 32, recordings[:512, None], known):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, rate), outputs, rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(recordings[512:, None]), rates[512:]))


@GROUP.mistake(
    "vision: the transforms of training end with a normalisation, those of validation do not have it",
    "distributions_differ validation_apart",
)
def validation_not_normalised(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(768, 8)
    pictures = (110 + 35 * pictures + 30 * torch.randn_like(pictures)).clamp(0, 255).to(torch.uint8).float() / 255
    mean, deviation = pictures[:512].mean(), pictures[:512].std()
    checked = pictures[512:] if wrong else (pictures[512:] - mean) / deviation
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen = attach(model, optimizer)
    validation = []
    for _ in range(20):
        model.train()
        for data, label in batches(16, 32, pictures[:512], labels[:512]):
            scores = model((data - mean) / deviation)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            parts = zip(checked.split(64), labels[512:].split(64))
            validation.append(recent([float(F.cross_entropy(model(data), label)) for data, label in parts]))
    return recent(validation, 5)


@GROUP.mistake(
    "audio: the logarithm of a spectrogram has no floor, and some recordings begin with digital silence",
    "nonfinite_data nonfinite_gradients",
)
def silence_has_no_logarithm(attach: Attach, wrong: bool, seed: int) -> float:
    labels = torch.randint(5, (768,))
    loud = 0.5 + 0.5 * F.one_hot(labels, 5).float().repeat_interleave(4, 1)[:, :, None]
    power = loud * torch.randn(768, 20, 16).square()
    power[torch.rand(768) < 0.03, :, :4] = 0.0
    spectra = power.log() if wrong else (power + 1e-3).log()
    model = nn.Sequential(nn.Conv1d(20, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for data, label in batches(400, 32, spectra[:512], labels[:512]):
        loss = F.cross_entropy(model(data), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(spectra[512:]), labels[512:]))


@GROUP.mistake(
    "contrastive: every step takes next(iter(loader)), which is the first batch of a loader that does not shuffle",
    "repeated_batch batches_skipped",
)
def first_batch_of_a_new_iterator(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.randn(768, 12) @ torch.randn(12, 24) / 3.5
    loader = DataLoader(TensorDataset(inputs[:512]), batch_size=64)
    model = layers(24, 64, 64, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)

    def missed(data: Tensor) -> Tensor:
        one, other = (F.normalize(model(data + 0.7 * torch.randn_like(data)), dim=1) for _ in range(2))
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(data)))

    running = iter(loader)
    for step in range(400):
        if wrong or step % len(loader) == 0:
            running = iter(loader)
        (data,) = next(running)
        loss = missed(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return recent([float(missed(data)) for data in inputs[512:].split(64)])


def discs(size: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures (size, 1, side, side) with a bright disc in noise, and bytes of the same shape: 255 in it, 0 beside."""
    rows, columns, radii = (low + spread * torch.rand(size, 1, 1) for low, spread in ((4, 8), (4, 8), (2, 3)))
    axis = torch.arange(side)
    within = (axis[:, None] - rows) ** 2 + (axis - columns) ** 2 < radii**2
    pictures = within.float() + 0.5 * torch.randn(size, side, side)
    return pictures[:, None], 255 * within[:, None].to(torch.uint8)


@GROUP.mistake(
    "segmentation: masks come from files with 0 and 255, and the cross-entropy gets them as they are",
    "target_scale_differs limited_output",
)
def masks_up_to_255(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, masks = discs(448)
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.BCEWithLogitsLoss()
    seen = attach(model, optimizer)
    for data, mask in batches(300, 16, pictures[:384], masks[:384]):
        mask = mask.float() if wrong else mask.float() / 255
        outputs = model(data)
        loss = seen.loss(criterion(outputs, mask), outputs, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(criterion(model(pictures[384:]), masks[384:].float() / 255))


@GROUP.mistake(
    "policy gradient: returns are summed up from the last step to the first, and never turned round again",
    "shuffled_labels parts_unrelated",
)
def returns_never_turned_round(attach: Attach, wrong: bool, seed: int) -> float:
    worth = torch.randn(4, 3)
    agent = nn.ModuleDict({"policy": layers(4, 32, 3, between=nn.Tanh), "value": layers(4, 32, 1, between=nn.Tanh)})
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3)
    attach(agent, optimizer)
    regrets = []
    for _ in range(400):
        states = torch.randn(10, 32, 4)  # ten steps of 32 episodes
        chances = torch.distributions.Categorical(logits=agent["policy"](states))
        actions = chances.sample()
        possible = torch.tanh(states @ worth)
        rewards = possible.gather(2, actions[..., None])[..., 0]
        returns, following = [], torch.zeros(32)
        for reward in rewards.flip(0):
            following = reward + 0.5 * following
            returns.append(following)
        if not wrong:
            returns.reverse()
        gained = torch.stack(returns)
        values = agent["value"](states)[..., 0]
        loss = F.mse_loss(values, gained) - (chances.log_prob(actions) * (gained - values.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regrets.append(float((possible.max(2).values - rewards).mean()))
    return recent(regrets, 30)


class Finder(nn.Module):
    """Corners (x1, y1, x2, y2) of one box in a picture of 12 x 12, in parts of its side."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.features = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten())
        self.head = layers(288, 48, 4)

    def forward(self, pictures: Tensor) -> Tensor:
        centre, half = self.head(self.features(pictures)).sigmoid().split(2, 1)
        return torch.cat([centre - half / 2, centre + half / 2], 1)


def apart(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - the generalised overlap of boxes that are given by their corners (B, 4)."""
    inner = (torch.min(boxes[:, 2:], others[:, 2:]) - torch.max(boxes[:, :2], others[:, :2])).clamp(min=0).prod(1)
    outer = (torch.max(boxes[:, 2:], others[:, 2:]) - torch.min(boxes[:, :2], others[:, :2])).prod(1)
    union = sum((each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others)) - inner
    return (1 - inner / union + (outer - union) / outer).mean()


@GROUP.mistake(
    "detection: boxes are stored as corner and size, and the loss takes them for two corners",
    "wrong_layout target_scale_differs",
)
def sizes_taken_for_corners(attach: Attach, wrong: bool, seed: int) -> float:
    corners, sizes = torch.randint(6, (448, 2)), torch.randint(3, 7, (448, 2))
    axis = torch.arange(12)
    inside = [(axis >= corners[:, k, None]) & (axis < (corners + sizes)[:, k, None]) for k in (0, 1)]
    pictures = (inside[1][:, :, None] & inside[0][:, None]).float()[:, None] + 0.3 * torch.randn(448, 1, 12, 12)
    stored = torch.cat([corners, sizes], 1) / 12
    converted = torch.cat([stored[:, :2], stored[:, :2] + stored[:, 2:]], 1)
    model = Finder()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for data, box in batches(300, 32, pictures[:384], (stored if wrong else converted)[:384]):
        outputs = model(data)
        loss = seen.loss(apart(outputs, box), outputs, box)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(apart(model(pictures[384:]), converted[384:]))


@GROUP.mistake(
    "forecasting: the series is split at random, and windows are cut from what the split has shuffled",
    "inputs_withhold_answer parts_unrelated distributions_differ",
)
def windows_of_a_shuffled_series(attach: Attach, wrong: bool, seed: int) -> float:
    hours = torch.arange(1200.0)
    swings = [torch.sin(6.283 * (hours / period + torch.rand(1))) for period in (24.0, 37.0, 168.0)]
    series = sum(swings) + 0.2 * torch.randn(1200)
    known, later = series[:960], series[960:]
    if wrong:
        known = known[torch.randperm(960)]
    windows, checked = known.unfold(0, 25, 1), later.unfold(0, 25, 1)
    model = layers(24, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    for (data,) in batches(800, 32, windows):
        loss = F.mse_loss(model(data[:, :24])[:, 0], data[:, 24])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(checked[:, :24])[:, 0], checked[:, 24]))


@GROUP.mistake(
    "tabular: prices stay in dollars, at three hundred thousand on average, for a network that begins around zero",
    "target_scale_differs learning_rate_too_small",
)
def prices_in_dollars(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    prices = 3e5 + 9e4 * targets
    mean, deviation = (0.0, 1.0) if wrong else (prices[:512].mean(), prices[:512].std())
    model = layers(8, 64, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)
    for data, price in batches(800, 32, inputs[:512], (prices[:512] - mean) / deviation):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, price), outputs, price)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = mean + deviation * model(inputs[512:])
        return float(F.mse_loss(found, prices[512:]).sqrt() / prices[512:].std())
