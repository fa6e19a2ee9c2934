"""Right loops whose batches are unusual: always the same, in the same order, bags, packed rows, padded, left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, images, mlp

RIGHT = Group("right_data")


@RIGHT.right("full-batch training: every step sees all of a small data set")
def full_batch(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 3)
    x, y = task.batch(draw.choice((64, 128)))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 5e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        outputs = model(x)
        loss = F.mse_loss(outputs, y)
        optimizer.zero_grad()
        seen.loss(loss, outputs, y).backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("a small data set whose batches come in the same order in every epoch")
def same_order(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 4, classes=True)
    batches = [task.batch(32) for _ in range(draw.choice((3, 5, 8)))]
    model = mlp(8, draw.choice((24, 32)), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.05, 0.1)), momentum=0.9)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(40):
        for x, y in batches:
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            optimizer.zero_grad()
            seen.loss(loss, outputs, y).backward()
            optimizer.step()
            losses.append(loss.detach())
    falls(losses)


class Bags(nn.Module):
    """Instances (bags, instances, width) in, one answer a bag out: attention over the instances."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.body, self.score, self.head = (
            mlp(width, hidden, hidden, depth=1),
            nn.Linear(hidden, 1),
            nn.Linear(hidden, 1),
        )

    def forward(self, bags: Tensor) -> Tensor:
        inside = self.body(bags.flatten(0, 1)).unflatten(0, bags.shape[:2])
        return self.head((self.score(inside).softmax(1) * inside).sum(1)).squeeze(1)


@RIGHT.right("multiple instances: the network folds bags into the batch, and gives one number a bag")
def bags(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, instances = 6, draw.choice((4, 6))
    model = Bags(width, draw.choice((16, 24)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        x = torch.randn(32, instances, width)
        y = (x[..., 0].amax(1) > 1.2).float()
        outputs = model(x)
        loss = F.binary_cross_entropy_with_logits(outputs, y)
        optimizer.zero_grad()
        seen.loss(loss, outputs, y).backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Graphs(nn.Module):
    """Node features of several graphs in one tensor in, one row a graph out: messages between neighbours, then sums."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, width), nn.Linear(2 * width, width), nn.Linear(width, classes)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        inside = F.relu(self.first(nodes))
        messages = torch.zeros_like(inside).index_add(0, edges[1], inside[edges[0]])
        inside = F.relu(self.second(torch.cat((inside, messages), 1)))
        return self.head(inside.new_zeros(count, inside.shape[1]).index_add(0, graph, inside) / 5)


@RIGHT.right("graphs of unlike sizes in one batch: many nodes in, few rows out, other numbers of them each time")
def graphs(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Graphs(draw.choice((16, 24)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        sizes = torch.randint(3, 9, (16,))
        labels = torch.randint(3, (16,))
        graph = torch.repeat_interleave(torch.arange(16), sizes)
        nodes = 0.5 * torch.randn(len(graph), 4) + F.one_hot(labels, 4)[graph]
        ends = torch.arange(len(graph) - 1)
        inner = graph[:-1] == graph[1:]
        edges = torch.stack((ends[inner], ends[inner] + 1))
        loss = F.cross_entropy(model(nodes, edges, graph, 16), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


class Packed(nn.Module):
    """Rows of unlike length (rows, longest) with 0 for padding in; one row a real symbol out."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width, padding_idx=0)
        self.cell, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, symbols)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(rows))[0][rows > 0])


@RIGHT.right("padded rows: the embedding of the padding stays zero, and padded places are left out of the loss")
def padded(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols, longest = draw.choice((6, 8)), draw.choice((6, 10))
    model = Packed(symbols, draw.choice((16, 24)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        rows = torch.randint(1, symbols, (24, longest))
        rows[torch.arange(longest) >= torch.randint(2, longest + 1, (24, 1))] = 0
        loss = F.cross_entropy(model(rows), rows.cummax(1).values[rows > 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right(
    "a margin that most samples satisfy later: their gradients are exactly zero, sometimes those of a whole step"
)
def margin_satisfied(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model, direction = mlp(6, draw.choice((16, 24)), 1, depth=1), torch.randn(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.1, 0.2)), momentum=0.9)
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x = torch.randn(draw.choice((4, 8)), 6)
        signs = torch.where(x @ direction >= 0, 1.0, -1.0)
        x = x + 0.8 * signs[:, None] * direction / direction.norm()
        loss = F.relu(0.5 - signs * model(x).squeeze(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("outliers are left out: a batch whose loss is far above the usual gets no backward pass, nor a step")
def outliers_left_out(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, share = Task(8, 3), draw.choice((0.1, 0.3))
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(250):
        x, y = task.batch(32)
        if draw.random() < share:
            y = 20 * torch.randn_like(y)
        loss = F.mse_loss(model(x), y)
        if loss > 20:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("mixup and label smoothing: targets are distributions, inputs are mixtures of two samples")
def mixed_samples(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, classes = draw.choice((6, 8)), draw.choice((4, 6))
    model = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((1e-3, 2e-3)))
    seen = attach(model, optimizer)
    losses, beta = [], torch.distributions.Beta(0.4, 0.4)
    for _ in range(120):
        x, y = images(16, classes)
        share, other = beta.sample(), torch.randperm(16)
        target = share * F.one_hot(y, classes) + (1 - share) * F.one_hot(y[other], classes)
        outputs = model(share * x + (1 - share) * x[other])
        loss = F.cross_entropy(outputs, target, label_smoothing=0.1)
        optimizer.zero_grad()
        seen.loss(loss, outputs, target).backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
