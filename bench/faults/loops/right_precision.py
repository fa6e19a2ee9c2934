"""Right loops in mixed or low precision, or with a compiled forward pass or step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, images, mlp

RIGHT = Group("right_precision")


@RIGHT.right("autocast in bfloat16: float32 weights, 16-bit matrix products, the loss outside")
def autocast(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((8, 12))
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.GELU(), nn.Flatten(), nn.Linear(64 * width, 6)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((1e-3, 2e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(80):
        x, y = images(16, 6)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        loss = seen.loss(F.cross_entropy(outputs.float(), y), outputs, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("GradScaler: scaled backward, unscaled, clipped, stepped, with a first scale that is too large")
def grad_scaler(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((32, 48)), 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** draw.choice((16, 20, 24)), growth_interval=40)
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(32)
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("torch.compile of the model, watched as compiled or as it was")
def compiled_model(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    torch._dynamo.reset()
    fast = torch.compile(model, backend=draw.choice(("eager", "aot_eager")))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(fast if seed % 2 else model, optimizer)
    losses = []
    for _ in range(150):
        x, y = task.batch(32)
        loss = F.mse_loss(fast(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("torch.compile of a function that is the whole training step, or of its forward and loss")
def compiled_step(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 4, classes=True)
    model = mlp(8, draw.choice((24, 32)), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.05, 0.1)), momentum=0.9)
    torch._dynamo.reset()
    attach(model, optimizer)

    def criterion(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        loss = fast(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    fast = torch.compile(step if seed % 2 else criterion, backend="eager")
    run = fast if seed % 2 else outer
    falls([run(*task.batch(32)) for _ in range(150)])


class MasterWeights(torch.optim.AdamW):
    """AdamW that keeps float32 copies of 16-bit weights, steps those and rounds them back."""

    def __init__(self, parameters: list[nn.Parameter], **options: float) -> None:
        self.low = parameters
        super().__init__([nn.Parameter(each.detach().float()) for each in parameters], **options)  # type: ignore[arg-type]
        self.high = self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for high, low in zip(self.high, self.low, strict=True):
            high.grad = None if low.grad is None else low.grad.float()
        super().step()
        for high, low in zip(self.high, self.low, strict=True):
            low.copy_(high)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for low in self.low:
            low.grad = None


@RIGHT.right("bfloat16 weights whose optimizer holds float32 masters, other tensors than the model's")
def master_weights(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    model = mlp(8, draw.choice((32, 48)), 3).bfloat16()
    optimizer = MasterWeights(list(model.parameters()), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(48)
        loss = F.mse_loss(model(x.bfloat16()).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("bfloat16 weights with masters inside the optimizer's state, behind the model's own tensors")
def masters_in_state(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)

    class Masters(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state.update(master=p.float(), momentum=torch.zeros_like(p, dtype=torch.float32))
                    state["momentum"].mul_(0.9).add_(p.grad.float())
                    state["master"].add_(state["momentum"], alpha=-group["lr"])
                    p.copy_(state["master"])

    task = Task(8, 3)
    model = mlp(8, draw.choice((32, 48)), 3).bfloat16()
    optimizer = Masters(model.parameters(), {"lr": draw.choice((0.01, 0.02))})
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(48)
        loss = F.mse_loss(model(x.bfloat16()).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
