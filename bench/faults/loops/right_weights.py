"""Right loops whose weights are masked, rounded, normed or shared on their way to the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, images, mlp, train

RIGHT = Group("right_weights")


@RIGHT.right("pruning: masks of torch.nn.utils.prune hold most weights at zero, and more of them half-way")
def pruning(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((32, 48)), 3)
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=draw.choice((0.3, 0.5)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for step in range(300):
        if step == 150:
            prune.l1_unstructured(model[2], "weight", amount=0.3)
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Sign(torch.autograd.Function):
    """The sign, with the gradient of the identity between -1 and 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return slope * (x.abs() <= 1)


class Signs(nn.Module):
    """A parametrization: the signs of the weights, scaled."""

    def forward(self, weight: Tensor) -> Tensor:
        return Sign.apply(weight) * weight.detach().abs().mean()


@RIGHT.right("a binary network: signs with a straight-through gradient, and weights clamped after each step")
def binary_network(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 4, classes=True)
    model = mlp(8, draw.choice((32, 64)), 4)
    parametrize.register_parametrization(model[2], "weight", Signs())
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(48)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model[2].parametrizations.weight.original.clamp_(-1, 1)
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("spectral norm on one network, weight norm on another: parametrizations change the tensors' names")
def normed_weights(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, classes = Task(8, 3), draw.choice((3, 4))
    norm = parametrizations.spectral_norm if seed % 2 else parametrizations.weight_norm
    model = nn.ModuleDict({"body": mlp(8, 32, 24), "head": nn.Linear(24, 3)})
    norm(model["body"][0])
    norm(model["body"][2])
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for step in range(250):
        model.train()
        x, y = task.batch(16 * classes)
        loss = F.mse_loss(model["head"](model["body"](x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 50 == 49:
            model.eval()
            with torch.no_grad():
                model["head"](model["body"](task.batch(16)[0]))
    falls(losses)


class Quantised(nn.Linear):
    """A linear layer whose weights and inputs are rounded to few levels, with the gradient passed straight through."""

    def __init__(self, before: int, after: int, bits: int) -> None:
        super().__init__(before, after)
        self.levels = 2 ** (bits - 1) - 1

    def rounded(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().max() / self.levels + 1e-8
        return x + ((x / scale).round() * scale - x).detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x), self.rounded(self.weight), self.bias)


@RIGHT.right("quantisation-aware training with a straight-through estimator and fake quantisation of torch")
def quantised(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width, bits = Task(8, 5, classes=True), draw.choice((24, 32)), draw.choice((3, 4, 8))
    model = nn.Sequential(
        Quantised(8, width, bits), nn.ReLU(), Quantised(width, width, bits), nn.Hardtanh(0, 3), nn.Linear(width, 5)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    falls(train(attach, model, optimizer, lambda: task.batch(32), 200))


@RIGHT.right("a convolutional network fine-tuned with its BatchNorm in evaluation mode and without gradient")
def frozen_batchnorm(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((8, 12))
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 6)
    )
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images(16, 6)[0])
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(
        [each for each in model.parameters() if each.requires_grad], lr=draw.choice((0.02, 0.05)), momentum=0.9
    )
    attach(model, optimizer, frozen=("1.",))
    losses = []
    for _ in range(100):
        model.train()
        model[1].eval()
        x, y = images(16, 6)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
