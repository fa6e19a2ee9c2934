"""Right loops whose losses, passes or weights look unlike those of a plain one, each for a good reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, mlp

RIGHT = Group("right_more")


class Masked(nn.Module):
    """What the hidden patches of a picture are, from those that are shown."""

    def __init__(self, patches: int, size: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(size, width), nn.Linear(width, size)
        self.places = nn.Parameter(0.1 * torch.randn(patches, width))
        self.hidden = nn.Parameter(torch.zeros(width))
        self.encoder = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, patches: Tensor, shown: Tensor) -> Tensor:
        at = shown[:, :, None].expand(-1, -1, self.hidden.numel())
        states = (self.embed(patches) + self.places).gather(1, at)
        whole = (self.hidden + self.places).repeat(len(patches), 1, 1).scatter(1, at, self.encoder(states))
        return self.head(self.decoder(whole))


@RIGHT.right("a masked autoencoder: the network sees a quarter of the patches, and the others alone are in the loss")
def masked_pictures(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Masked(12, 6, draw.choice((16, 24)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((2e-3, 4e-3)), weight_decay=0.05)
    seen = attach(model, optimizer)
    ways, losses = torch.randn(3, 72), []
    for _ in range(250):
        patches = (torch.randn(32, 3) @ ways).view(32, 12, 6) / 3**0.5
        order = torch.rand(32, 12).argsort(1)
        rebuilt = model(patches, order[:, :4])
        missing = torch.ones(32, 12).scatter(1, order[:, :4], 0.0)
        error = ((rebuilt - patches).square().mean(2) * missing).sum() / missing.sum()
        loss = seen.loss(error, rebuilt, patches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Flow(nn.Module):
    """Couplings that take samples in two dimensions to a normal distribution, and the logarithm of their volume."""

    def __init__(self, couplings: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(mlp(1, width, 2, depth=1, unit=nn.Tanh) for _ in range(couplings))
        for coupling in self.couplings:
            nn.init.zeros_(coupling[-1].weight)
            nn.init.zeros_(coupling[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(len(x))
        for coupling in self.couplings:
            kept, moved = x.chunk(2, 1)
            scale, shift = coupling(kept).chunk(2, 1)
            x = torch.cat([moved * scale.exp() + shift, kept], 1)
            volume = volume + scale[:, 0]
        return x, volume


@RIGHT.right("a normalising flow: couplings that start as the identity, and a loss that falls below zero")
def flow(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Flow(draw.choice((4, 6)), 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 5e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        turn = 3.14 * torch.rand(64)
        x = 0.3 * torch.stack([turn.cos(), turn.sin()], 1) + 0.02 * torch.randn(64, 2)
        z, volume = model(x)
        loss = seen.loss((0.5 * z.square().sum(1) - volume).mean())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
    if not losses[-1] < 0:
        raise RuntimeError(f"The likelihood of the flow stays at {losses[-1]:.3f}.")


class Equilibrium(nn.Module):
    """The fixed point of one layer, found without a graph; the gradient is that of one more pass through it."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.inject, self.layer, self.head = (
            nn.Linear(inputs, width),
            nn.Linear(width, width),
            nn.Linear(width, outputs),
        )
        nn.init.orthogonal_(self.layer.weight, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        given = self.inject(x)
        state = torch.zeros_like(given)
        with torch.no_grad():
            for _ in range(12):
                state = torch.tanh(self.layer(state) + given)
        return self.head(torch.tanh(self.layer(state) + given))


@RIGHT.right("a deep equilibrium network: twelve calls of a layer without a graph, and one more with it")
def equilibrium(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = Equilibrium(8, draw.choice((32, 48)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        x, y = task.batch(32)
        outputs = model(x)
        loss = seen.loss(F.mse_loss(outputs, y), outputs, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Reservoir(nn.Module):
    """A large recurrent network of fixed random weights, and a linear layer that reads it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = torch.randn(width, width)
        self.register_buffer("inner", 0.9 * inner / torch.linalg.eigvals(inner).abs().max())
        self.register_buffer("outer", 0.5 * torch.randn(width))
        self.register_buffer("state", torch.zeros(width))
        self.read = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        states = []
        for value in series:
            self.state = torch.tanh(self.inner @ self.state + self.outer * value)
            states.append(self.state)
        return self.read(torch.stack(states))[:, 0]


@RIGHT.right("an echo state network: recurrent weights and state are buffers, the layer that reads them is trained")
def reservoir(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Reservoir(draw.choice((80, 120)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    attach(model, optimizer)
    time_ = torch.arange(150 * 20 + 1) / 10
    series = torch.sin(time_) * torch.cos(0.31 * time_) + 0.02 * torch.randn(len(time_))
    losses = []
    for step in range(150):  # one window behind the other: the state goes on
        window = series[20 * step : 20 * step + 21]
        loss = F.mse_loss(model(window[:-1]), window[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("local losses: each block has a head, a loss and an optimizer of its own, and its input is detached")
def local_losses(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 4, classes=True), draw.choice((32, 48))
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(before, width), nn.ReLU()) for before in (8, width, width))
    heads = nn.ModuleList(nn.Linear(width, 4) for _ in blocks)
    rate = draw.choice((2e-3, 4e-3))
    optimizers = [
        torch.optim.Adam([*block.parameters(), *head.parameters()], lr=rate)
        for block, head in zip(blocks, heads, strict=True)
    ]
    attach(nn.ModuleDict({"blocks": blocks, "heads": heads}), optimizers)
    losses = []
    for _ in range(200):
        x, y = task.batch(48)
        for block, head, optimizer in zip(blocks, heads, optimizers, strict=True):
            x = block(x.detach())
            loss = F.cross_entropy(head(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("quantiles: three outputs a sample are compared with its one target, which is broadcast on purpose")
def quantiles(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, shares = Task(6, 1, noise=0.3), torch.tensor([0.1, 0.5, 0.9])
    model = mlp(6, draw.choice((32, 48)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        x, y = task.batch(64)
        outputs = model(x)
        short = y - outputs  # (B, 1) - (B, 3)
        loss = seen.loss(torch.maximum(shares * short, (shares - 1) * short).mean(), outputs, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right(
    "an energy-based model: samples follow the gradient by the input, and the loss is a difference around zero"
)
def energies(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = mlp(2, draw.choice((32, 48)), 1, unit=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((1e-3, 2e-3)), betas=(0.0, 0.99))
    attach(model, optimizer)
    kept, distances = 3 * torch.randn(512, 2), []
    for _ in range(200):
        chosen = torch.randint(512, (64,))
        fake = kept[chosen]
        for _ in range(6):
            fake.requires_grad_(True)
            (slope,) = torch.autograd.grad(model(fake).sum(), fake)
            fake = (fake - 0.2 * slope + 0.1 * torch.randn(64, 2)).detach()
        kept[chosen] = fake
        real = torch.tensor([1.5, -1.0]) + 0.4 * torch.randn(64, 2)
        of_real, of_fake = model(real), model(fake)
        loss = of_real.mean() - of_fake.mean() + 0.1 * (of_real.square() + of_fake.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append((fake.mean(0) - real.mean(0)).norm())
    falls(distances)


class Hypernetwork(nn.Module):
    """Makes the weights of a small network out of a description of the task, and runs it on the inputs."""

    def __init__(self, described: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs, self.hidden = inputs, hidden
        self.first = mlp(described, 32, inputs * hidden, depth=1)
        self.second = mlp(described, 32, hidden, depth=1)

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        states = torch.tanh(x @ self.first(task).view(self.inputs, self.hidden))
        return states @ self.second(task)


@RIGHT.right("a hypernetwork: the weights that meet the inputs are outputs of another network, a new set in each step")
def hypernetwork(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Hypernetwork(3, 4, draw.choice((16, 24)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    seen = attach(model, optimizer)
    ways, losses = torch.randn(3, 4), []
    for _ in range(400):
        task, x = torch.randn(3), torch.randn(32, 4)
        y = torch.tanh(x @ (task @ ways))
        outputs = model(task, x)
        loss = seen.loss(F.mse_loss(outputs, y), outputs, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("co-teaching: of noisy labels, each of two networks takes the samples that the other has a small loss on")
def coteaching(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width, spoilt = Task(8, 4, classes=True), draw.choice((32, 48)), draw.choice((0.2, 0.3))
    pair = nn.ModuleList(mlp(8, width, 4) for _ in range(2))
    optimizers = [torch.optim.Adam(network.parameters(), lr=3e-3) for network in pair]
    attach(pair, optimizers)
    losses = []
    for step in range(250):
        x, y = task.batch(64)
        noisy = torch.where(torch.rand(64) < spoilt, torch.randint(4, (64,)), y)
        kept = round(64 * (1 - spoilt * min(1.0, step / 100)))
        with torch.no_grad():
            chosen = [F.cross_entropy(network(x), noisy, reduction="none").argsort()[:kept] for network in pair]
        for network, optimizer, of_other in zip(pair, optimizers, reversed(chosen), strict=True):
            loss = F.cross_entropy(network(x[of_other]), noisy[of_other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Picture(nn.Module):
    """A picture that is trained, and a random network, frozen, that looks at it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pixels = nn.Parameter(0.1 * torch.randn(1, 3, 16, 16))
        self.eye = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.ReLU())
        self.eye.requires_grad_(False)

    def style(self, picture: Tensor) -> Tensor:
        features = self.eye(picture).flatten(2)[0]
        return features @ features.T / features.shape[1]

    def forward(self) -> Tensor:
        return self.style(self.pixels.clamp(-1, 1))


@RIGHT.right("style transfer: the one trained tensor is a picture, the network is frozen, and every step has one input")
def picture_is_trained(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Picture(draw.choice((12, 16)))
    optimizer = torch.optim.Adam([model.pixels], lr=draw.choice((1e-2, 2e-2)))
    attach(model, optimizer, frozen=["eye"])
    losses = []
    with torch.no_grad():
        wanted = model.style((torch.sin(torch.arange(16.0)) * torch.rand(1, 3, 1, 1)).expand(1, 3, 16, 16))
    for _ in range(200):
        loss = 1e3 * F.mse_loss(model(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
