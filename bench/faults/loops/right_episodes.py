"""Right loops that begin again from earlier weights, or learn how to begin."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, fit, mlp

RIGHT = Group("right_episodes")


@RIGHT.right("episodes: each begins from the same weights, adapts for some steps and is thrown away")
def episodic_reset(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = mlp(6, draw.choice((24, 32)), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.1, 0.2)))
    attach(model, optimizer)
    start, losses = copy.deepcopy(model.state_dict()), []
    for _ in range(draw.choice((10, 15))):
        model.load_state_dict(start)
        losses.append(torch.stack(fit(model, optimizer, Task(6, 2), draw.choice((5, 16, 24)))))
    falls(torch.stack([each[-1] - each[0] for each in losses]).cumsum(0))


@RIGHT.right("test-time adaptation: LayerNorm is adapted to each stream by its entropy, then put back")
def test_time_adaptation(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((24, 32))
    task = Task(8, 4, classes=True)
    model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 4))
    first = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        x, y = task.batch(32)
        first.zero_grad()
        F.cross_entropy(model(x), y).backward()
        first.step()
    for each in (model[0], model[3]):
        each.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=draw.choice((0.2, 0.4)), momentum=0.9)
    attach(model, optimizer, frozen=("0.", "3."))
    start, entropies = copy.deepcopy(model.state_dict()), []
    for _ in range(12):
        model.load_state_dict(start)
        shift = torch.randn(8)
        for _ in range(10):
            outputs = model(task.batch(32)[0] + shift).log_softmax(1)
            entropy = -(outputs.exp() * outputs).sum(1).mean()
            optimizer.zero_grad()
            entropy.backward()
            optimizer.step()
            entropies.append(entropy.detach())
    if not sum(entropies[9::10]) < sum(entropies[::10]):
        raise RuntimeError("The loop does not learn: entropies do not fall within the streams.")


@RIGHT.right("Reptile: the inner loop trains the model itself, the outer moves the old weights towards what it found")
def reptile(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model, inner = mlp(1, draw.choice((24, 32)), 1, unit=nn.Tanh), draw.choice((5, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attach(model, optimizer)
    losses = []
    for number in range(80):
        before = [p.detach().clone() for p in model.parameters()]
        phase, height = draw.uniform(0, 1), draw.uniform(0.5, 1.5)
        for _ in range(inner):
            x = 4 * torch.rand(16, 1) - 2
            loss = F.mse_loss(model(x), height * torch.sin(2 * x + phase))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old + (1 - number / 80) * (p - old))
    falls(losses)


@RIGHT.right("MAML: the inner step is differentiated through, on functional copies of the weights")
def maml(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model, rate = mlp(1, draw.choice((16, 24)), 1, unit=nn.Tanh), draw.choice((0.05, 0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        outer = torch.zeros(())
        for _ in range(2):
            phase = draw.uniform(0, 1)
            x, query = 4 * torch.rand(2, 12, 1) - 2
            weights = dict(model.named_parameters())
            loss = F.mse_loss(functional_call(model, weights, (x,)), torch.sin(2 * x + phase))
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            fast = {name: p - rate * slope for (name, p), slope in zip(weights.items(), slopes, strict=True)}
            outer = outer + F.mse_loss(functional_call(model, fast, (query,)), torch.sin(2 * query + phase))
        optimizer.zero_grad()
        outer.backward()
        optimizer.step()
        losses.append(outer.detach())
    falls(losses)
