"""Right loops that lay hands on weights, networks or settings between the steps, on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, fit, mlp

RIGHT = Group("right_hands")


@RIGHT.right("weights are projected after each step: rows of unit length, biases that are not negative")
def projected_weights(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((32, 48)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.05, 0.1)), momentum=0.9)
    attach(model, optimizer)

    @torch.no_grad()
    def project(step: int, loss: Tensor) -> None:
        model[0].weight.copy_(F.normalize(model[0].weight, dim=1))
        model[0].bias.clamp_(min=0)

    falls(fit(model, optimizer, task, 250, project))


@RIGHT.right("a WGAN whose critic's weights are clipped to a small interval after each of its steps")
def clipped_critic(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    critic, generator, bound = mlp(2, 32, 1), mlp(4, 24, 2), draw.choice((0.1, 0.2))
    first = torch.optim.RMSprop(critic.parameters(), lr=2e-3)
    second = torch.optim.RMSprop(generator.parameters(), lr=draw.choice((1e-3, 2e-3)))
    attach(nn.ModuleList([critic, generator]), [first, second])
    distances = []
    for _ in range(150):
        for _ in range(3):
            real = torch.tensor([3.0, -2.0]) + 0.5 * torch.randn(32, 2)
            with torch.no_grad():
                fake = generator(torch.randn(32, 4))
            first.zero_grad()
            (critic(fake).mean() - critic(real).mean()).backward()
            first.step()
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-bound, bound)
        made = generator(torch.randn(32, 4))
        second.zero_grad()
        (-critic(made).mean()).backward()
        second.step()
        distances.append((made.detach().mean(0) - real.mean(0)).norm())
    falls(distances)


@RIGHT.right("Lookahead: every few steps the weights go back half of the way to where they were")
def lookahead(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, often = Task(8, 3), draw.choice((5, 10))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    slow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def look(step: int, loss: Tensor) -> None:
        if step % often == often - 1:
            for old, p in zip(slow, model.parameters(), strict=True):
                old.lerp_(p, 0.5)
                p.copy_(old)

    falls(fit(model, optimizer, task, 250, look))


class ActNorm(nn.Module):
    """A scale and a shift a channel, set by the first batch so that it leaves with unit variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("begun", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.begun:
            with torch.no_grad():
                self.scale.copy_(1 / (x.std(0) + 1e-6))
                self.shift.copy_(-x.mean(0) * self.scale)
                self.begun.fill_(True)
        return x * self.scale + self.shift


@RIGHT.right("ActNorm: the first forward pass in training sets parameters from its batch")
def set_by_the_first_batch(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((24, 32))
    model = nn.Sequential(
        nn.Linear(8, width), ActNorm(width), nn.ReLU(), nn.Linear(width, width), ActNorm(width), nn.ReLU()
    )
    model.append(nn.Linear(width, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    falls(fit(model, optimizer, task, 200))


@RIGHT.right("a network that grows: a block is put in half-way, and its parameters join the optimizer")
def growing(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 3), draw.choice((24, 32))
    model = mlp(8, width, 3, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = fit(model, optimizer, task, 120)
    block = nn.Linear(width, width)
    nn.init.eye_(block.weight)
    nn.init.zeros_(block.bias)
    model.insert(2, block)
    model.insert(3, nn.ReLU())
    optimizer.add_param_group({"params": list(block.parameters())})
    falls(losses + fit(model, optimizer, task, 120))


class Codes(nn.Module):
    """An autoencoder through the nearest of some codes, which follow what is assigned to them, without gradient."""

    def __init__(self, inputs: int, codes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(inputs, 24, 4, depth=1), mlp(4, 24, inputs, depth=1)
        self.register_buffer("codes", torch.randn(codes, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.encoder(x)
        chosen = torch.cdist(inside, self.codes).argmin(1)
        near = self.codes[chosen]
        if self.training:
            with torch.no_grad():
                for number in chosen.unique():
                    self.codes[number].lerp_(inside[chosen == number].mean(0), 0.1)
        return self.decoder(inside + (near - inside).detach()), F.mse_loss(inside, near)


@RIGHT.right("VQ-VAE: gradients pass straight through the nearest code; codes are buffers that follow on their own")
def vector_quantised(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    inputs, mixing = draw.choice((8, 10)), torch.randn(2, 10)
    model = Codes(inputs, draw.choice((16, 32)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x = torch.randn(48, 2) @ mixing[:, :inputs]
        outputs, apart = model(x)
        loss = F.mse_loss(outputs, x)
        optimizer.zero_grad()
        (loss + 0.25 * apart).backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("settings that change on a plan: dropout, a temperature and the weight of a term, as the run goes on")
def planned_settings(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, steps = Task(8, 4, classes=True), draw.choice((200, 250))
    dropout = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), dropout, nn.Linear(48, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for step in range(steps):
        done = step / steps
        dropout.p = 0.5 * (1 - done)
        x, y = task.batch(32)
        outputs = model(x) / (2 - done)
        loss = F.cross_entropy(outputs, y)
        losses.append(loss.detach())
        optimizer.zero_grad()
        (loss + 0.01 * done * outputs.square().mean()).backward()
        optimizer.step()
    falls(losses)


@RIGHT.right("hooks on gradients: one tensor's is scaled, as discriminative fine-tuning and gradient reversal do")
def gradient_hooks(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, factor = Task(8, 3), draw.choice((0.1, 0.5))
    model = mlp(8, draw.choice((24, 32)), 3)
    for p in model[0].parameters():
        p.register_hook(lambda slope: factor * slope)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.05, 0.1)), momentum=0.9)
    attach(model, optimizer)
    falls(fit(model, optimizer, task, 250))


class Reversal(torch.autograd.Function):
    """The identity, with the opposite gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> Tensor:  # type: ignore[override]
        return -0.1 * slope


@RIGHT.right("domain-adversarial training: a layer that reverses gradients between the body and the domain's head")
def gradient_reversal(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3, classes=True)
    model = nn.ModuleDict(
        {"body": mlp(9, draw.choice((24, 32)), 16), "label": nn.Linear(16, 3), "domain": nn.Linear(16, 1)}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        domain = torch.randint(2, (32, 1)).float()
        inside = F.relu(model["body"](torch.cat((x, domain), 1)))
        loss = F.cross_entropy(model["label"](inside), y)
        losses.append(loss.detach())
        optimizer.zero_grad()
        (loss + F.binary_cross_entropy_with_logits(model["domain"](Reversal.apply(inside)), domain)).backward()
        optimizer.step()
    falls(losses)
