"""What the fused step computes, in plain torch on flat buffers: any device, any floating dtype, no host reads.

T tensors, R rows of 64 elements, P = 64 R elements. Indices of all tables are in layout.py.

Pass one (`measure`) takes the sum of squares and the non-finite count of every tensor; `decide` turns them into norm,
clip factor, skip flag, counters and one row of coefficients per tensor; pass two (`apply`) does

    g <- sign * clip / scale * grad  (+ weight_decay * p for Adam)
    m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    ema <- ema + (1 - decay) (p - ema)

Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2; clipping as in Pascanu
et al., ICML 2013, with torch's 1e-6 in the denominator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Accumulate, Apply, Decide, Measure
from .layout import ROW, Coefficient, Group, Hyper, Segment, State, Telemetry

_HALF = (torch.bfloat16, torch.float16)


def _row_owner(segments: Tensor, rows: int) -> Tensor:
    """(R,) tensor number of every row."""
    owners = torch.arange(segments.shape[0], device=segments.device)
    return torch.repeat_interleave(owners, segments[:, Segment.PADDED] // ROW, output_size=rows)


def accumulate(*args: Any) -> None:
    """grad <- (0 if overwrite else grad) + scale * gradients; the i-th gradient begins at element starts[i].

    A tensor without gradient is given as an empty one. With `norm` also writes what `measure` writes.
    """
    a = Accumulate(*args)
    for gradient, start in zip(a.gradients, a.starts, strict=True):
        view = a.grad[start : start + gradient.numel()]
        scaled = gradient.reshape(-1).to(a.grad.dtype) * a.scale
        view.copy_(scaled if a.overwrite else view + scaled)
    if a.norm:
        _totals(a.grad, a.segments, a.sums, a.state)


def measure(*args: Any) -> None:
    """Pass one. `chunks`, `partial` and `tickets` are for the kernels and not used here."""
    a = Measure(*args)
    _totals(a.grad, a.segments, a.sums, a.state)
    if a.finish:
        decide(a.segments, a.hyper, a.sums, a.telemetry, a.steps, a.coefficients, a.state)


def _totals(grad: Tensor, segments: Tensor, sums: Tensor, state: Tensor) -> None:
    """Writes sums (T, 2): sum of squares and non-finite count of every tensor with a gradient, and their totals."""
    rows = grad.view(-1, ROW)
    owner = _row_owner(segments, rows.shape[0])
    per_row = torch.stack([rows.double().square().sum(1), (~rows.isfinite()).double().sum(1)], dim=1)
    live = (segments[:, Segment.CHUNKS] > 0)[:, None]
    sums.copy_(torch.where(live, torch.zeros_like(sums).index_add_(0, owner, per_row), 0.0))
    state[State.SUMSQ : State.BAD + 1] = sums.sum(0)


def decide(*args: Any) -> None:
    """From the totals in `state` to norm, skip, clip, counters and loss scale; then per tensor: telemetry, step,
    coefficients."""
    segments, hyper, sums, telemetry, steps, coefficients, state = Decide(*args)
    scale = state[State.SCALE] * state[State.EXTERNAL_SCALE]
    norm = state[State.SUMSQ].sqrt() / scale
    skip = (state[State.BAD] + state[State.EXTERNAL_BAD] > 0) | ~norm.isfinite()
    clip = (hyper[Hyper.MAX_NORM] / (norm + 1e-6)).clamp(max=1.0)
    _count(hyper, sums, state, norm, skip, clip)

    live = segments[:, Segment.CHUNKS] > 0
    zero = torch.zeros((), dtype=torch.float64, device=state.device)
    telemetry[:, Telemetry.GRAD_NORM] = (sums[:, 0].sqrt() / scale).float()
    telemetry[:, Telemetry.NONFINITE] = sums[:, 1].float()
    untouched = skip | ~live
    telemetry[:, Telemetry.UPDATE_NORM] = torch.where(untouched, zero, telemetry[:, Telemetry.UPDATE_NORM])
    steps += torch.where(untouched, 0.0, 1.0)
    group = hyper[Hyper.GROUPS :].view(-1, Group.COUNT)[segments[:, Segment.GROUP]]
    lr, beta1, beta2, eps, weight_decay, sign, decoupled, _ = group.unbind(1)
    t = steps.double().clamp(min=1)
    rows = [
        sign * clip / scale,
        torch.where(decoupled > 0, 1 - lr * weight_decay, 1.0),
        torch.where(decoupled > 0, zero, weight_decay),
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**t),
        1 / (1 - beta2**t).sqrt(),
        eps,
    ]
    coefficients[:, : len(rows)] = torch.stack(rows, dim=1).to(coefficients.dtype)


def _count(hyper: Tensor, sums: Tensor, state: Tensor, norm: Tensor, skip: Tensor, clip: Tensor) -> None:
    """Writes every slot of `state` but the totals."""
    one = torch.ones_like(norm)
    applied = torch.where(skip, 0.0, one)
    state[State.ATTEMPTED] += 1
    state[State.APPLIED] += applied
    state[State.SKIPPED] += 1 - applied
    state[State.CLIPPED] += applied * (clip < 1)
    state[State.NORM], state[State.CLIP], state[State.SKIP] = norm, clip, 1 - applied
    bad = sums[:, 1] > 0
    first = torch.where(bad.any(), bad.to(torch.int8).argmax().double(), -one)
    state[State.FIRST_BAD] = torch.where(skip, first, state[State.FIRST_BAD])

    t, decay = state[State.APPLIED], hyper[Hyper.EMA_DECAY]
    warm = torch.minimum(decay, (1 + t) / (10 + t))
    state[State.EMA_WEIGHT] = 1 - torch.where(hyper[Hyper.EMA_WARMUP] > 0, warm, decay)

    dynamic = hyper[Hyper.DYNAMIC] > 0
    growth = (state[State.GROWTH] + 1) * applied
    grow = growth >= hyper[Hyper.GROWTH_INTERVAL]
    factor = torch.where(skip, 0.5 * one, torch.where(grow, 2 * one, one))
    state[State.SCALE] *= torch.where(dynamic, factor, one)
    state[State.GROWTH] = torch.where(dynamic & ~grow, growth, 0.0)


def apply(*args: Any) -> None:
    """Pass two. A skipped step and a tensor without gradient leave everything bit-identical (a cleared gradient apart).

    Numerics: bfloat16 and float16 buffers are updated in float32 and rounded once.
    """
    a = Apply(*args)
    wide = torch.float32 if a.param.dtype in _HALF else a.param.dtype
    owner = _row_owner(a.segments, a.param.numel() // ROW)
    live = a.segments[:, Segment.CHUNKS] > 0
    keep = (live & (a.state[State.SKIP] == 0))[owner][:, None]
    c = a.coefficients.to(wide)[owner][:, :, None].unbind(1)
    p = a.param.view(-1, ROW).to(wide, copy=True)
    g, m, v = (x.view(-1, ROW).to(wide) for x in (a.grad, a.exp_avg, a.exp_avg_sq))

    g = g * c[Coefficient.GRADIENT] + c[Coefficient.L2] * p
    m = m + c[Coefficient.MOMENT1] * (g - m)
    v = v * c[Coefficient.BETA2] + c[Coefficient.MOMENT2] * g * g
    new = p * c[Coefficient.DECAY] - c[Coefficient.STEP] * m / (v.sqrt() * c[Coefficient.ROOT] + c[Coefficient.EPS])
    _write(keep, (a.param, new), (a.exp_avg, m), (a.exp_avg_sq, v))
    if a.ema is not None:
        average = a.ema.view(-1, ROW)
        weight = a.state[State.EMA_WEIGHT].to(a.ema.dtype)
        _write(keep, (a.ema, average + weight * (a.param.view(-1, ROW).to(a.ema.dtype) - average)))
    if a.clear:
        a.grad.view(-1, ROW).masked_fill_(live[owner][:, None], 0.0)
    _norms(a.telemetry, a.hyper, keep, owner, a.param.view(-1, ROW), p)


def _write(keep: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Replaces the rows of each target in which `keep` is true."""
    for target, value in pairs:
        rows = target.view(-1, ROW)
        rows.copy_(torch.where(keep, value.to(target.dtype), rows))


def _norms(telemetry: Tensor, hyper: Tensor, keep: Tensor, owner: Tensor, new: Tensor, old: Tensor) -> None:
    """Weight and update norm of the tensors that moved; the others keep what `decide` left."""
    new, old = new.double(), old.double()
    per_row = torch.stack([new.square().sum(1), (new - old).square().sum(1)], dim=1)
    norms = per_row.new_zeros(telemetry.shape[0], 2).index_add_(0, owner, per_row).sqrt()
    moved = torch.zeros_like(norms).index_add_(0, owner, keep.double().expand(-1, 2)) > 0
    both = telemetry[:, Telemetry.WEIGHT_NORM : Telemetry.UPDATE_NORM + 1]
    both.copy_(torch.where(moved & (hyper[Hyper.TELEMETRY] > 0), norms.float(), both))
