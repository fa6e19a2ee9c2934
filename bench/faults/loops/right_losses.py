"""Right loops whose loss is unusual: derivatives inside it, several forward passes, passes without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, images, mlp

RIGHT = Group("right_losses")


@RIGHT.right("a physics-informed network: second derivatives of the output by the input are in the loss")
def physics_informed(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model, wave = mlp(1, draw.choice((16, 24)), 1, unit=nn.Tanh), draw.choice((2.0, 3.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    attach(model, optimizer)
    losses, ends = [], torch.tensor([[0.0], [1.0]])
    for _ in range(250):
        x = torch.rand(32, 1).requires_grad_()
        u = model(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        loss = ((second + wave**2 * torch.sin(wave * x)) ** 2).mean() + 10 * F.mse_loss(
            model(ends), torch.sin(wave * ends)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("forces: an energy model whose forward pass differentiates itself, trained on energies and forces")
def forces(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(6, draw.choice((24, 32)), 1, unit=nn.SiLU)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                energy = self.body(x)
                (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
            return energy, -slope

    model = Energy()
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for step in range(200):
        x = torch.randn(32, 6)
        energy, force = model(x)
        loss = F.mse_loss(energy, (x**2).sum(1, keepdim=True) / 2) + F.mse_loss(force, -x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 50 == 49:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
    falls(losses)


@RIGHT.right("siamese and triplet: the same network two or three times before each backward pass")
def triplet(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, draw.choice((3, 5)), classes=True)
    model = mlp(8, draw.choice((24, 32)), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(48)
        same = y[:, None] == y
        near, far = (torch.multinomial(each.float() + 1e-9, 1).squeeze(1) for each in (same, ~same))
        if seed % 2:
            loss = F.triplet_margin_loss(model(x), model(x[near]), model(x[far]), margin=0.5)
        else:
            other = torch.where(torch.rand(48) < 0.5, near, far)
            signs = torch.where(y == y[other], 1.0, -1.0)
            loss = F.cosine_embedding_loss(model(x), model(x[other]), signs, margin=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("CLIP: two models and a temperature in one optimizer")
def two_models(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    left, right = mlp(10, draw.choice((24, 32)), 8), mlp(6, 32, 8)
    scale, mixing = nn.Parameter(torch.tensor(2.0)), torch.randn(6, 10)
    optimizer = torch.optim.AdamW([*left.parameters(), *right.parameters(), scale], lr=draw.choice((2e-3, 4e-3)))
    attach(nn.ModuleList([left, right]), optimizer)
    losses = []
    for _ in range(200):
        second = torch.randn(24, 6)
        first = torch.tanh(second @ mixing) + 0.1 * torch.randn(24, 10)
        logits = scale.exp() * F.normalize(left(first), dim=1) @ F.normalize(right(second), dim=1).T
        rows = torch.arange(24)
        loss = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("Monte-Carlo dropout: validation is made of many passes in training mode without gradient, on purpose")
def dropout_samples(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((32, 48))
    model = nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses, samples = [], draw.choice((10, 20))
    for step in range(200):
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 19:
            with torch.no_grad():
                torch.stack([model(x) for _ in range(samples)]).std(0)
    falls(losses)


@RIGHT.right("BatchNorm is recalibrated after each epoch by forward passes in training mode without gradient")
def recalibrated(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, classes = draw.choice((6, 8)), draw.choice((4, 6))
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * width, classes),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.02, 0.05)), momentum=0.9)
    attach(model, optimizer)
    losses = []
    for _ in range(6):
        model.train()
        for _ in range(15):
            x, y = images(16, classes)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model[1].reset_running_stats()
        with torch.no_grad():
            for _ in range(draw.choice((15, 30))):
                model(images(16, classes)[0])
        model.eval()
        with torch.no_grad():
            model(images(16, classes)[0])
    falls(losses)


@RIGHT.right("hard examples: a pass without gradient ranks a large batch, and the step takes the worst part of it")
def hard_examples(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 5, classes=True)
    model = mlp(8, draw.choice((24, 32)), 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(64)
        with torch.no_grad():
            each = F.cross_entropy(model(x), y, reduction="none")
        losses.append(each.mean())
        chosen = each.topk(draw.choice((16, 32))).indices
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    falls(losses)


@RIGHT.right(
    "losses that are right on unusual shapes: (batch, 1) with (batch, 1), log-softmax with nll, sigmoid with bce"
)
def unusual_shapes(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    kind, task = seed % 3, Task(8, 4, classes=True)
    model = nn.Sequential(
        *mlp(8, draw.choice((24, 32)), 1 if kind else 4), (nn.LogSoftmax(1), nn.Identity(), nn.Sigmoid())[kind]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        outputs, whole = model(x), (y >= 2).float()[:, None]
        if kind == 0:
            loss = seen.loss(F.nll_loss(outputs, y), outputs, y)
        elif kind == 1:
            loss = seen.loss(F.mse_loss(outputs, whole), outputs, whole)
        else:
            loss = seen.loss(
                F.binary_cross_entropy(outputs.squeeze(1), whole.squeeze(1)), outputs.squeeze(1), whole.squeeze(1)
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
