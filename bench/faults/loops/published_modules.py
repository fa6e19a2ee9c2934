"""Errors of TrainCheck inside modules: modes, buffers, processors. The table of all is in `published`."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, mlp

PUBLISHED = Group("published_modules")


@PUBLISHED.mistake(
    "a spectrally normalised network is evaluated before any pass in training mode has normalised its weights",
    "unsettled_buffers",
    source="https://github.com/pytorch/pytorch/issues/51800",
)
def spectral_norm_unsettled(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    for layer in (model[0], model[2], model[4]):
        nn.utils.spectral_norm(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    validation = task.batch(64)

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            value = float(F.mse_loss(model(validation[0]), validation[1]))
        model.train()
        return value

    if not wrong:
        with torch.no_grad():
            model(validation[0])
    validate()
    for step in range(150):
        x, y = task.batch(32)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        if step % 50 == 49:
            validate()


class Attending(nn.Module):
    """Attention with dropout on its weights: in training only, or, as a fused kernel is told, always."""

    def __init__(self, symbols: int, width: int, always: bool) -> None:
        super().__init__()
        self.embed, self.mixed = nn.Embedding(symbols, width), nn.Linear(width, 3 * width)
        self.head, self.always, self.dropout = nn.Linear(width, symbols), always, 0.1

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows)
        dropout = self.dropout if self.training or self.always else 0.0
        query, key, value = (each[:, None] for each in self.mixed(x).chunk(3, -1))
        return self.head(x + F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)[:, 0])


@PUBLISHED.mistake(
    "the attention kernel is given its dropout rate in evaluation mode too",
    "train_mode_in_validation",
    source="https://github.com/huggingface/transformers/pull/33844",
)
def dropout_in_evaluation(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    symbols = draw.choice((6, 8))
    model = Attending(symbols, 16, always=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    held = torch.randint(symbols, (32, 6))
    for step in range(150):
        rows = torch.randint(symbols, (24, 6))
        optimizer.zero_grad()
        F.cross_entropy(model(rows).flatten(0, 1), rows.flip(1).flatten()).backward()
        optimizer.step()
        if step % 25 == 24:
            model.eval()
            with torch.no_grad():
                model(held)
            model.train()


class Processed(nn.Module):
    """A network with its processor: a list of pictures a sample in, one row a sample out, or one row for all."""

    def __init__(self, width: int, merged: bool) -> None:
        super().__init__()
        self.body, self.merged = mlp(8, width, 2), merged

    def forward(self, samples: Tensor) -> Tensor:
        rows = samples.flatten(0, 1).mean(0, keepdim=True) if self.merged else samples.mean(1)
        return self.body(rows)


@PUBLISHED.mistake(
    "the processor takes the pictures of all samples for one sample's, and the loss broadcasts its one row",
    "batch_shrinks shapes_broadcast",
    source="https://github.com/huggingface/transformers/issues/34204",
)
def batch_merged(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 2)
    model = Processed(draw.choice((24, 32)), merged=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    for _ in range(200):
        x, y = task.batch(32)
        outputs = model(x[:, None] + 0.1 * torch.randn(32, 2, 8))
        optimizer.zero_grad()
        seen.loss(F.mse_loss(outputs, y), outputs, y).backward()
        optimizer.step()


class Traced(fx.Interpreter):
    """Runs a traced network; `dispatched` says whether the ambient autocast reaches its linear layers."""

    def __init__(self, model: nn.Module, dispatched: bool) -> None:
        super().__init__(fx.symbolic_trace(model))
        self.dispatched = dispatched

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Tensor:  # type: ignore[override]
        if self.dispatched or not isinstance(self.fetch_attr(target), nn.Linear):
            return super().call_module(target, args, kwargs)
        with torch.autocast("cpu", enabled=False):
            return super().call_module(target, tuple(each.float() for each in args), kwargs)


@PUBLISHED.mistake(
    "the traced network's linear layers do not see the autocast region that they run in, and stay in float32",
    "compiled_differs",
    source="https://github.com/Lightning-AI/lightning-thunder/issues/725",
)
def autocast_not_traced(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    fast = Traced(model, dispatched=not wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    for _ in range(150):
        x, y = task.batch(32)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = fast.run(x)
        optimizer.zero_grad()
        seen.loss(F.mse_loss(outputs.float(), y), outputs, y).backward()
        optimizer.step()
