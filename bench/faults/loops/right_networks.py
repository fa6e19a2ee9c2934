"""Right loops whose network is unusual: recurrent, sparse, random, recomputed, or partly unused in a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, images, mlp, train

RIGHT = Group("right_networks")


class Recomputed(nn.Module):
    """Residual blocks whose inner values are computed again in the backward pass."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)) for _ in range(depth)]
        )
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.last(x)


@RIGHT.right("gradient checkpointing around blocks with dropout, with the random state kept")
def checkpointing(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 5, classes=True)
    model = Recomputed(draw.choice((16, 24)), draw.choice((2, 4)), 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    falls(train(attach, model, optimizer, lambda: task.batch(32), 150))


@RIGHT.right("BatchNorm and dropout: training and validation passes take turns, the last batch is smaller")
def train_and_eval(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, classes = draw.choice((6, 8)), draw.choice((4, 6))
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.Flatten(),
        nn.Linear(64 * width, classes),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=draw.choice((0.02, 0.05)), momentum=0.9, weight_decay=1e-4)
    attach(model, optimizer)
    losses = []
    for _ in range(8):
        model.train()
        for size in (24, 24, 24, 24, 24, 24, 24, 24, 24, 7):
            x, y = images(size, classes)
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.eval()
        with torch.inference_mode():
            for _ in range(4):
                model(images(24, classes)[0])
    falls(losses)


class Counter(nn.Module):
    """A recurrent network with its state handed in and out."""

    def __init__(self, symbols: int, width: int, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.cell = (
            nn.LSTM(width, width, batch_first=True) if kind == "lstm" else nn.GRU(width, width, batch_first=True)
        )
        self.head = nn.Linear(width, symbols)

    def forward(self, rows: Tensor, state: object = None) -> tuple[Tensor, object]:
        inside, state = self.cell(self.embed(rows), state)
        return self.head(inside), state


@RIGHT.right("truncated back-propagation through time: the recurrent state is kept and detached between windows")
def truncated_recurrence(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols, window = draw.choice((5, 7)), draw.choice((6, 8))
    model = Counter(symbols, draw.choice((16, 24)), draw.choice(("lstm", "gru")))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    attach(model, optimizer)
    losses, state = [], None
    place = torch.randint(symbols, (16, 1))
    for step in range(120):
        rows = (place + torch.arange(window + 1) * (1 + place % 2)) % symbols
        place = rows[:, -1:]
        outputs, state = model(rows[:, :-1], state)
        state = tuple(each.detach() for each in state) if isinstance(state, tuple) else state.detach()
        loss = F.cross_entropy(outputs.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if step % 40 == 39:
            state, place = None, torch.randint(symbols, (16, 1))
    falls(losses)


class Bag(nn.Module):
    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, width, mode="sum", sparse=True)
        self.head = mlp(width, 24, classes, depth=1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.words(rows))


@RIGHT.right("embeddings with sparse gradients and SparseAdam, dense layers with Adam")
def sparse_embeddings(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    words, classes = draw.choice((200, 400)), draw.choice((3, 5))
    model, labels = Bag(words, 12, classes), torch.randint(classes, (words,))
    first = torch.optim.SparseAdam(model.words.parameters(), lr=draw.choice((0.02, 0.05)))
    second = torch.optim.Adam(model.head.parameters(), lr=5e-3)
    attach(model, [first, second])
    losses = []
    for _ in range(200):
        rows = torch.randint(words, (32, 3))
        rows[:, 1:] = rows[:, :1]
        loss = F.cross_entropy(model(rows), labels[rows[:, 0]])
        first.zero_grad()
        second.zero_grad()
        loss.backward()
        first.step()
        second.step()
        losses.append(loss.detach())
    falls(losses)


class Experts(nn.Module):
    """A layer of experts, of which each sample uses the best two of a softmax; some may be chosen by none."""

    def __init__(self, width: int, experts: int, classes: int) -> None:
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList([mlp(8, width, width, depth=1) for _ in range(experts)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(1)
        best, chosen = weights.topk(2, dim=1)
        mixed = x.new_zeros(len(x), self.head.in_features)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                mixed = mixed.index_add(0, rows, best[rows, place, None] * expert(x[rows]))
        return self.head(F.relu(mixed))


@RIGHT.right("a mixture of experts, some of which no sample of a step chooses")
def experts(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 4, classes=True)
    model = Experts(draw.choice((12, 16)), draw.choice((8, 16)), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((4e-3, 8e-3)))
    falls(train(attach, model, optimizer, lambda: task.batch(8), 250))


class Stochastic(nn.Module):
    """Residual blocks that are left out at random in training, whole batches at a time."""

    def __init__(self, width: int, depth: int, keep: float) -> None:
        super().__init__()
        self.first, self.last, self.keep = nn.Linear(8, width), nn.Linear(width, 5), keep
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks, 1):
            keep = 1 - (1 - self.keep) * number / len(self.blocks)
            if not self.training or torch.rand(()) < keep:
                x = x + block(x)
        return self.last(x)


@RIGHT.right("stochastic depth: blocks that a step leaves out receive no gradient in it")
def stochastic_depth(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task = Task(8, 5, classes=True)
    model = Stochastic(draw.choice((16, 24)), draw.choice((3, 5)), draw.choice((0.3, 0.5)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    falls(train(attach, model, optimizer, lambda: task.batch(32), 200))


class Variational(nn.Module):
    def __init__(self, inputs: int, hidden: int, inside: int) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(inputs, hidden, 2 * inside, depth=1), mlp(inside, hidden, inputs, depth=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + (0.5 * log).exp() * torch.randn_like(mean)), mean, log


@RIGHT.right("VAE: the target is the input, and the weight of the Kullback-Leibler term grows from 0")
def variational(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    inputs, warm = draw.choice((8, 12)), draw.choice((50, 100))
    model, mixing = Variational(inputs, draw.choice((24, 32)), draw.choice((2, 3))), torch.randn(2, inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    seen = attach(model, optimizer)
    losses = []
    for step in range(250):
        x = torch.randn(32, 2) @ mixing + 0.1 * torch.randn(32, inputs)
        outputs, mean, log = model(x)
        near = F.mse_loss(outputs, x)
        apart = -0.5 * (1 + log - mean**2 - log.exp()).sum(1).mean()
        optimizer.zero_grad()
        seen.loss(near + 0.02 * min(1.0, step / warm) * apart, outputs, x).backward()
        optimizer.step()
        losses.append(near.detach())
    falls(losses)


@RIGHT.right("layers made lazily: parameters get their shape in a first forward pass before the optimizer is made")
def lazy_layers(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, classes = draw.choice((8, 12)), draw.choice((4, 6))
    model = nn.Sequential(nn.LazyConv2d(width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))
    model(images(4, classes)[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    falls(train(attach, model, optimizer, lambda: images(16, classes), 100))


class Pieces(nn.Module):
    """Attention with a causal mask over positions, with a pre-norm and a learned scale that starts at 0."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(symbols, width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(width, symbols)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows)
        mask = nn.Transformer.generate_square_subsequent_mask(rows.shape[1])
        inside = self.norm(x)
        return self.head(x + self.gate * self.attention(inside, inside, inside, attn_mask=mask, need_weights=False)[0])


@RIGHT.right("ReZero: a gate that starts at 0, so that the layers behind it have no gradient in the first step")
def gate_from_zero(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols, length = draw.choice((6, 8)), draw.choice((5, 6))
    model = Pieces(symbols, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        rows = torch.randint(symbols, (24, length))
        loss = F.cross_entropy(model(rows).flatten(0, 1), rows.cummax(1).values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)
