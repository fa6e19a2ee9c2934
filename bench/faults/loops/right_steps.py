"""Right loops whose step is unusual: accumulated, closed over, scaled, compiled, or with gradients made by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, mlp

RIGHT = Group("right_steps")


@RIGHT.right("accumulation: the loss of each micro-batch is divided, the rest at the end of an epoch too")
def accumulation(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, parts, batches = Task(8, 3), draw.choice((3, 4, 8)), 25
    model = mlp(8, 32, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(12):
        for number in range(batches):
            x, y = task.batch(16)
            outputs = model(x)
            loss = F.mse_loss(outputs, y)
            group = min(parts, batches - number // parts * parts)
            seen.loss(loss / group, outputs, y).backward()
            losses.append(loss.detach())
            if number % parts == parts - 1 or number == batches - 1:
                optimizer.step()
                optimizer.zero_grad()
    falls(losses)


@RIGHT.right("accumulation over more batches than the loop has seen: a report before the first step")
def report_before_the_first_step(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, parts = Task(8, 3), draw.choice((32, 64))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    for _ in range(draw.randrange(8, parts)):
        x, y = task.batch(16)
        (F.mse_loss(model(x), y) / parts).backward()


@RIGHT.right("L-BFGS: the closure runs forward and backward several times a step")
def lbfgs(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    x, y = Task(6, 2).batch(draw.choice((128, 200)))
    model = mlp(6, draw.choice((12, 16)), 2, unit=nn.Tanh)
    search = "strong_wolfe" if seed % 2 else None
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1.0 if search else 0.3, max_iter=draw.choice((4, 8)), line_search_fn=search
    )
    attach(model, optimizer)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(30):
        losses.append(optimizer.step(closure).detach())
    falls(losses)


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation over a base optimizer: climb, take the gradient there, go back, step."""

    def __init__(self, parameters: object, base: type[torch.optim.Optimizer], rho: float, **options: float) -> None:
        super().__init__(parameters, {"rho": rho, **options})  # type: ignore[arg-type]
        self.base = base(self.param_groups, **options)  # type: ignore[arg-type]
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["before"] = p.clone()
                    p.add_(p.grad, alpha=group["rho"] / (float(norm) + 1e-12))

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state and "before" in self.state[p]:
                    p.copy_(self.state[p].pop("before"))
        self.base.step()


@RIGHT.right("SAM: two forward and backward passes a step, the weights moved away and back between them")
def sharpness_aware(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 5, classes=True)
    model = mlp(8, draw.choice((24, 32)), 5)
    optimizer = Sharpness(model.parameters(), torch.optim.SGD, draw.choice((0.02, 0.05)), lr=0.1, momentum=0.9)
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(48)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.climb()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("SAM by hand: the weights are moved and restored in the loop, around a plain optimizer")
def sharpness_by_hand(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, rho = Task(8, 3), draw.choice((0.02, 0.05))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(32)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        with torch.no_grad():
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            moves = [rho * p.grad / (norm + 1e-12) for p in model.parameters() if p.grad is not None]
            torch._foreach_add_(list(model.parameters()), moves)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("gradient noise, annealed, is added between backward and step")
def gradient_noise(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, amount = Task(8, 3), draw.choice((0.01, 0.03))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for step in range(250):
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad += amount / (1 + step) ** 0.55 * torch.randn_like(p.grad)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("PCGrad: the gradients of two tasks are projected off each other and written back")
def projected_gradients(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    first, second = Task(8, 2), Task(8, 2)
    model = nn.ModuleDict({"body": mlp(8, draw.choice((24, 32)), 16), "a": nn.Linear(16, 2), "b": nn.Linear(16, 2)})
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 5e-3)))
    attach(model, optimizer)
    parameters, losses = list(model.parameters()), []
    for _ in range(200):
        x, y = first.batch(32)
        inside = F.relu(model["body"](x))
        parts = [F.mse_loss(model["a"](inside), y), F.mse_loss(model["b"](inside), second.answer(x))]
        slopes = []
        for part in parts:
            found = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            slopes.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        flat = [torch.cat([g.flatten() for g in each]) for each in slopes]
        dot = flat[0] @ flat[1]
        if dot < 0:
            flat = [flat[0] - dot / flat[1].dot(flat[1]) * flat[1], flat[1] - dot / flat[0].dot(flat[0]) * flat[0]]
        pieces = (flat[0] + flat[1]).split([p.numel() for p in parameters])
        for p, piece in zip(parameters, pieces, strict=True):
            p.grad = piece.view_as(p).clone()
        optimizer.step()
        losses.append((parts[0] + parts[1]).detach())
    falls(losses)


@RIGHT.right("gradient centralisation and clipping by value before the step")
def centralised_and_clipped(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, bound = Task(8, 5, classes=True), draw.choice((0.02, 0.1))
    model = mlp(8, draw.choice((24, 32)), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.1, 0.2)), momentum=0.9, nesterov=True)
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            if p.grad is not None and p.dim() > 1:
                p.grad.sub_(p.grad.mean(1, keepdim=True))
        nn.utils.clip_grad_value_(model.parameters(), bound)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("two backward passes through one forward pass, into the same gradients")
def two_backwards(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, labels = Task(8, 3), Task(8, 4, classes=True)
    model = mlp(8, draw.choice((24, 32)), 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 5e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(32)
        outputs = model(x)
        first, second = F.mse_loss(outputs[:, :3], y), F.cross_entropy(outputs[:, 3:], labels.answer(x))
        optimizer.zero_grad()
        first.backward(retain_graph=True)
        second.backward()
        optimizer.step()
        losses.append((first + second).detach())
    falls(losses)


@RIGHT.right("steps inside backward: one small optimizer a parameter, by hooks after its gradient is accumulated")
def step_in_backward(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, rate = Task(8, 3), draw.choice((2e-3, 4e-3))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizers = {p: torch.optim.Adam([p], lr=rate) for p in model.parameters()}

    def hook(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    attach(model, list(optimizers.values()))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    losses = []
    for _ in range(200):
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.detach())
    falls(losses)
