"""Right loops whose parameters are not all of one kind: frozen, tied, held by the loss, masked, unfrozen later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, mlp

RIGHT = Group("right_parameters")


class LowRank(nn.Module):
    """A linear layer that stays as it is, plus a product of a random and a zero matrix."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@RIGHT.right("LoRA: A random, B zero, the base frozen and declared so; only the factors are in the optimizer")
def lora(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, rank = draw.choice((16, 24)), draw.choice((2, 4))
    task = Task(8, 3)
    base = mlp(8, width, 3)
    layers = [LowRank(each, rank) if isinstance(each, nn.Linear) else each for each in base]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=draw.choice((3e-3, 1e-2))
    )
    attach(model, optimizer, frozen=("0.base", "2.base", "4.base"))
    losses = []
    for _ in range(300):
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("LoRA in bfloat16: a 16-bit base that stays still, float32 factors, the base not declared")
def lora_on_16_bits(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, layer = Task(draw.choice((8, 12)), 3), nn.Linear(24, 3)
    base = mlp(task.inputs, 32, 24).bfloat16().requires_grad_(False)
    model = nn.ModuleDict({"base": base, "head": LowRank(layer, 4)})
    optimizer = torch.optim.AdamW([model["head"].a, model["head"].b], lr=1e-2)
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        loss = F.mse_loss(model["head"](base(x.bfloat16()).float()), y)
        optimizer.zero_grad(set_to_none=draw.random() < 0.5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("adapters between frozen layers, which start as the identity")
def adapters(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((16, 24, 32))
    task = Task(8, 5, classes=True)
    body = nn.ModuleList([nn.Linear(8, width), nn.Linear(width, width)]).requires_grad_(False)
    slim = nn.ModuleList([nn.Sequential(nn.Linear(width, 4), nn.GELU(), nn.Linear(4, width)) for _ in body])
    for each in slim:
        nn.init.zeros_(each[2].weight)
        nn.init.zeros_(each[2].bias)
    model = nn.ModuleDict({"body": body, "adapters": slim, "head": nn.Linear(width, 5)})
    optimizer = torch.optim.AdamW([*slim.parameters(), *model["head"].parameters()], lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer, frozen=("body",))
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        for layer, adapter in zip(body, slim, strict=True):
            x = F.relu(layer(x))
            x = x + adapter(x)
        loss = F.cross_entropy(model["head"](x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Reader(nn.Module):
    """A one-layer transformer over short rows of symbols, with sines as its positions."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        angle = torch.arange(length)[:, None] * 10 ** (-2 * torch.arange(width) / width)
        self.positions = nn.Parameter(
            torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()), requires_grad=False
        )
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(rows) + self.positions))


@RIGHT.right("a transformer whose fixed sine positions are a parameter without gradient inside the optimizer")
def fixed_positions(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols, length = draw.choice((8, 12)), draw.choice((6, 8))
    model = Reader(symbols, length, draw.choice((16, 24)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        rows = torch.randint(symbols, (24, length))
        loss = F.cross_entropy(model(rows).flatten(0, 1), rows.flip(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("an auxiliary head that the loss uses at every 10th or 16th step only")
def rare_head(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    often, task, other = draw.choice((10, 16)), Task(8, 2), Task(8, 3, classes=True)
    model = nn.ModuleDict(
        {"body": mlp(8, draw.choice((24, 32)), 16), "main": nn.Linear(16, 2), "extra": nn.Linear(16, 3)}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 5e-3)))
    attach(model, optimizer)
    losses = []
    for step in range(330):
        x, y = task.batch(32)
        inside = model["body"](x)
        loss = F.mse_loss(model["main"](inside), y)
        losses.append(loss.detach())
        if step % often == often - 1:
            loss = loss + 0.3 * F.cross_entropy(model["extra"](inside), other.answer(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    falls(losses)


@RIGHT.right("tasks in turn: each step trains one of several heads on the same body")
def tasks_in_turn(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    tasks = [Task(6, 2) for _ in range(draw.choice((3, 4, 5)))]
    model = nn.ModuleDict({"body": mlp(6, 32, 24), "heads": nn.ModuleList([nn.Linear(24, 2) for _ in tasks])})
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 5e-3)))
    attach(model, optimizer)
    losses, block = [], draw.choice((1, 20))
    for step in range(400):
        turn = step // block % len(tasks)
        x, y = tasks[turn].batch(32)
        loss = F.mse_loss(model["heads"][turn](F.relu(model["body"](x))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Proxies(nn.Module):
    """A metric loss with a learned point for each class: the mean cross-entropy of scaled cosines."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(classes, width))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(8 * F.normalize(outputs, dim=1) @ F.normalize(self.points, dim=1).T, labels)


@RIGHT.right("metric learning: the loss has parameters, in the optimizer of the model or in one of their own")
def metric_learning(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, draw.choice((4, 6, 9)), classes=True)
    model, criterion = mlp(8, 32, 8), Proxies(task.outputs, 8)
    rate = draw.choice((2e-3, 4e-3))
    if seed % 2:
        optimizers = [
            torch.optim.Adam(
                [{"params": model.parameters()}, {"params": criterion.parameters(), "lr": 10 * rate}], lr=rate
            )
        ]
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=rate), torch.optim.SGD(criterion.parameters(), lr=0.5)]
    attach(model, optimizers)
    losses = []
    for _ in range(250):
        x, y = task.batch(48)
        loss = criterion(model(x), y)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("Kendall weights: the logarithms of two variances are learned beside the model, outside it")
def kendall_weights(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, labels = Task(8, 3), Task(8, 4, classes=True)
    model = mlp(8, draw.choice((24, 32)), 7)
    logs = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([*model.parameters(), logs], lr=draw.choice((3e-3, 5e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(300):
        x, y = task.batch(48)
        outputs = model(x)
        parts = torch.stack((F.mse_loss(outputs[:, :3], y), F.cross_entropy(outputs[:, 3:], labels.answer(x))))
        loss = (parts * (-logs).exp() + logs).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts.detach().sum())
    falls(losses)


@RIGHT.right("weight tying: a language model whose last layer is its embedding")
def weight_tying(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols = draw.choice((10, 16))
    model = Reader(symbols, 6, 16)
    nn.init.normal_(model.embed.weight, std=0.3)
    model.head.weight = model.embed.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((3e-3, 5e-3)), weight_decay=0.01)
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        rows = torch.randint(symbols, (24, 6))
        loss = F.cross_entropy(model(rows).flatten(0, 1), rows.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("progressive unfreezing: a group joins the optimizer at each third of the run")
def unfreezing(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, draw.choice((2, 3)))
    model = mlp(8, 32, task.outputs)
    layers = [model[4], model[2], model[0]]
    for layer in layers[1:]:
        layer.requires_grad_(False)
    rate = draw.choice((2e-3, 4e-3))
    optimizer = torch.optim.Adam(layers[0].parameters(), lr=rate)
    attach(model, optimizer)
    losses, third = [], draw.choice((80, 100))
    for step in range(3 * third):
        if step in (third, 2 * third):
            layers[step // third].requires_grad_(True)
            optimizer.add_param_group({"params": list(layers[step // third].parameters()), "lr": rate / 2})
        x, y = task.batch(32)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("a group whose learning rate is 0 all along, declared frozen")
def rate_zero_declared(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 2)
    model = nn.ModuleDict({"backbone": mlp(8, 48, 32), "head": mlp(32, draw.choice((16, 32)), 2, depth=1)})
    groups = [{"params": model["backbone"].parameters(), "lr": 0.0}, {"params": model["head"].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=draw.choice((0.1, 0.2)), momentum=0.9)
    attach(model, optimizer, frozen=("backbone",))
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        loss = F.mse_loss(model["head"](model["backbone"](x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
