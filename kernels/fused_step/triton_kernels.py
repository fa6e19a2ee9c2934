"""The fused step on CUDA: two launches a step, one program a chunk; formulas in reference.py, slots in layout.py.

Pass one: every program leaves the sum of squares of its chunk; the last program of a tensor adds that tensor's chunks,
the last tensor's program adds the tensors and decides (norm, skip, clip, counters, coefficients). Who is last is found
with counters in `tickets`, but what is added, and in which order, is fixed, so the bits repeat. Pass two updates, and
adds weight and update norms in the same manner. No scalar comes from the host: a Python float would be rounded to
float32. Loads and stores are 128 bits wide because every chunk starts at, and has a length of, a multiple of 64.

Not yet run on a GPU: interpreted on CPU against the reference, and compiled ahead of time for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Chunk, Coefficient, Group, Hyper, Segment, State, Telemetry

CHUNK = 4096  # elements a program
TILE = 1024  # elements of a round of pass two: 8 a thread of each of five buffers, which leaves room in the registers
ADD = 256  # partial sums, or tensors, handled at a time
WARPS = 4

_C = {f"C_{x.name}": tl.constexpr(int(x)) for x in Coefficient}
_S = {f"S_{x.name}": tl.constexpr(int(x)) for x in State}
_H = {f"H_{x.name}": tl.constexpr(int(x)) for x in Hyper}
_G = {f"G_{x.name}": tl.constexpr(int(x)) for x in Group}
_T = {f"T_{x.name}": tl.constexpr(int(x)) for x in Telemetry}
_N = {f"N_{x.name}": tl.constexpr(int(x)) for x in Segment}
_K = {f"K_{x.name}": tl.constexpr(int(x)) for x in Chunk}
globals().update(_C | _S | _H | _G | _T | _N | _K)


@triton.jit
def _chunk_sums(x):
    """Sum of squares and non-finite count in float64; the careful way only where the quick one overflowed."""
    total = tl.sum(x * x, axis=0).to(tl.float64)
    bad = total * 0.0
    if not (total < float("inf")):
        wide = x.to(tl.float64)
        total = tl.sum(wide * wide, axis=0)
        bad = tl.sum(tl.where(tl.abs(x) < float("inf"), 0.0, 1.0).to(tl.float64), axis=0)
    return total, bad


@triton.jit
def _add_partials(partial, first, count, ADD: tl.constexpr):
    """Sums of the two columns of `partial` over `count` chunks, in an order that depends on `count` alone."""
    lane = tl.arange(0, ADD)
    a = tl.zeros([ADD], dtype=tl.float64)
    b = tl.zeros([ADD], dtype=tl.float64)
    for begin in range(0, count, ADD):
        inside = begin + lane < count
        at = partial + 2 * (first + begin + lane)
        a += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        b += tl.load(at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _is_last(ticket, count):
    """Counts this program; true for the last of `count`. The barrier puts all its stores before the count."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1) == count - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _add_tensors(sums, segments, tensors, ADD: tl.constexpr):
    """Totals over tensors, and the first tensor with a non-finite value (or -1); clears the rows of tensors without
    gradient."""
    lane = tl.arange(0, ADD)
    a = tl.zeros([ADD], dtype=tl.float64)
    b = tl.zeros([ADD], dtype=tl.float64)
    first = tl.full([ADD], 2147483647, dtype=tl.int32)
    for begin in range(0, tensors, ADD):
        t = begin + lane
        inside = t < tensors
        live = inside & (tl.load(segments + t * N_COUNT + N_CHUNKS, mask=inside, other=0) > 0)
        square = tl.load(sums + 2 * t, mask=live, other=0.0, cache_modifier=".cg")
        bad = tl.load(sums + 2 * t + 1, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(sums + 2 * t, square, mask=inside & (live == 0))
        tl.store(sums + 2 * t + 1, bad, mask=inside & (live == 0))
        a += square
        b += bad
        first = tl.minimum(first, tl.where(bad > 0, t, 2147483647))
    least = tl.min(first, axis=0)
    return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.where(least == 2147483647, -1, least)


@triton.jit
def _decide(
    sumsq, bad, first_bad, segments, hyper, sums, telemetry, steps, coefficients, state, tensors, ADD: tl.constexpr
):
    """`decide` of the reference: scalars first, then a row of coefficients per tensor."""
    scale = tl.load(state + S_SCALE) * tl.load(state + S_EXTERNAL_SCALE)
    norm = tl.sqrt(sumsq) / scale
    skip = ((bad + tl.load(state + S_EXTERNAL_BAD)) > 0) | ((norm < float("inf")) == 0)
    taken = tl.where(skip, 0.0, 1.0).to(tl.float64)
    limit = tl.load(hyper + H_MAX_NORM) / (norm + 1e-6)
    clip = tl.where(limit > 1.0, 1.0, limit)
    applied = tl.load(state + S_APPLIED) + taken
    tl.store(state + S_ATTEMPTED, tl.load(state + S_ATTEMPTED) + 1.0)
    tl.store(state + S_APPLIED, applied)
    tl.store(state + S_SKIPPED, tl.load(state + S_SKIPPED) + 1.0 - taken)
    tl.store(state + S_CLIPPED, tl.load(state + S_CLIPPED) + tl.where(clip < 1.0, taken, 0.0))
    tl.store(state + S_NORM, norm)
    tl.store(state + S_CLIP, clip)
    tl.store(state + S_SKIP, 1.0 - taken)
    tl.store(state + S_FIRST_BAD, tl.where(skip, first_bad.to(tl.float64), tl.load(state + S_FIRST_BAD)))
    decay = tl.load(hyper + H_EMA_DECAY)
    warm = tl.minimum(decay, (1.0 + applied) / (10.0 + applied))
    tl.store(state + S_EMA_WEIGHT, 1.0 - tl.where(tl.load(hyper + H_EMA_WARMUP) > 0, warm, decay))
    growth = (tl.load(state + S_GROWTH) + 1.0) * taken
    grow = growth >= tl.load(hyper + H_GROWTH_INTERVAL)
    dynamic = tl.load(hyper + H_DYNAMIC) > 0
    factor = tl.where(skip, 0.5, tl.where(grow, 2.0, 1.0))
    tl.store(state + S_SCALE, tl.load(state + S_SCALE) * tl.where(dynamic, factor, 1.0))
    tl.store(state + S_GROWTH, tl.where(dynamic & (grow == 0), growth, 0.0))

    lane = tl.arange(0, ADD)
    for begin in range(0, tensors, ADD):
        t = begin + lane
        inside = t < tensors
        segment = segments + t * N_COUNT
        moved = tl.where(tl.load(segment + N_CHUNKS, mask=inside, other=0) > 0, taken, 0.0)
        square = tl.load(sums + 2 * t, mask=inside, other=0.0, cache_modifier=".cg")
        count = tl.load(sums + 2 * t + 1, mask=inside, other=0.0, cache_modifier=".cg")
        row = telemetry + t * T_COUNT
        tl.store(row + T_GRAD_NORM, (tl.sqrt(square) / scale).to(tl.float32), mask=inside)
        tl.store(row + T_NONFINITE, count.to(tl.float32), mask=inside)
        tl.store(row + T_UPDATE_NORM, tl.zeros([ADD], dtype=tl.float32), mask=inside & (moved == 0))
        step = tl.load(steps + t, mask=inside, other=0.0) + moved.to(tl.float32)
        tl.store(steps + t, step, mask=inside)
        age = tl.maximum(step, 1.0).to(tl.float64)
        group = hyper + H_GROUPS + tl.load(segment + N_GROUP, mask=inside, other=0) * G_COUNT
        lr = tl.load(group + G_LR)
        beta1 = tl.load(group + G_BETA1)
        beta2 = tl.load(group + G_BETA2)
        penalty = tl.load(group + G_WEIGHT_DECAY)
        decoupled = tl.load(group + G_DECOUPLED) > 0
        power1 = tl.exp(age * tl.log(beta1))  # of 0: exp(-inf) = 0
        power2 = tl.exp(age * tl.log(beta2))
        out = coefficients + t * C_COUNT
        tl.store(out + C_GRADIENT, (tl.load(group + G_SIGN) * clip / scale).to(tl.float32), mask=inside)
        tl.store(out + C_DECAY, tl.where(decoupled, 1.0 - lr * penalty, 1.0).to(tl.float32), mask=inside)
        tl.store(out + C_L2, tl.where(decoupled, 0.0, penalty).to(tl.float32), mask=inside)
        tl.store(out + C_MOMENT1, (1.0 - beta1).to(tl.float32), mask=inside)
        tl.store(out + C_BETA2, beta2.to(tl.float32), mask=inside)
        tl.store(out + C_MOMENT2, (1.0 - beta2).to(tl.float32), mask=inside)
        tl.store(out + C_STEP, (lr / (1.0 - power1)).to(tl.float32), mask=inside)
        tl.store(out + C_ROOT, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32), mask=inside)
        tl.store(out + C_EPS, tl.load(group + G_EPS).to(tl.float32), mask=inside)


@triton.jit
def _finish(total, bad, segment, segments, hyper, partial, sums, telemetry, steps, coefficients, state, tickets, tensors,
            FINISH: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """Leaves a chunk's sums; the last chunk of a tensor adds the tensor, the last tensor adds all and decides."""
    program = tl.program_id(0)
    tl.store(partial + 2 * program, total)
    tl.store(partial + 2 * program + 1, bad)
    count = tl.load(segments + segment * N_COUNT + N_CHUNKS).to(tl.int32)
    if _is_last(tickets + segment, count):
        square, wrong = _add_partials(partial, tl.load(segments + segment * N_COUNT + N_FIRST_CHUNK), count, ADD)
        tl.store(sums + 2 * segment, square)
        tl.store(sums + 2 * segment + 1, wrong)
        if _is_last(tickets + tensors, tl.load(tickets + tensors + 1)):
            sumsq, all_bad, first_bad = _add_tensors(sums, segments, tensors, ADD)
            tl.store(state + S_SUMSQ, sumsq)
            tl.store(state + S_BAD, all_bad)
            if FINISH:
                _decide(
                    sumsq,
                    all_bad,
                    first_bad,
                    segments,
                    hyper,
                    sums,
                    telemetry,
                    steps,
                    coefficients,
                    state,
                    tensors,
                    ADD,
                )


@triton.jit
def measure_kernel(grad, chunks, segments, hyper, partial, sums, telemetry, steps, coefficients, state, tickets, tensors,
                   FINISH: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """Pass one. Bytes: 4 an element."""
    row = chunks + tl.program_id(0) * K_COUNT
    start = tl.multiple_of(tl.load(row + K_START), 64)
    length = tl.multiple_of(tl.load(row + K_LENGTH), 64)
    offset = tl.arange(0, CHUNK)
    x = tl.load(grad + start + offset, mask=offset < length, other=0.0)
    total, bad = _chunk_sums(x)
    _finish(total, bad, tl.load(row + K_SEGMENT), segments, hyper, partial, sums, telemetry, steps, coefficients, state,
            tickets, tensors, FINISH, ADD)  # fmt: skip


@triton.jit
def decide_kernel(segments, hyper, sums, telemetry, steps, coefficients, state, tensors, ADD: tl.constexpr):
    """The decision alone, on totals that somebody else may have added up over several buffers. One program."""
    sumsq = tl.load(state + S_SUMSQ)
    bad = tl.load(state + S_BAD)
    _, _, first_bad = _add_tensors(sums, segments, tensors, ADD)
    _decide(sumsq, bad, first_bad, segments, hyper, sums, telemetry, steps, coefficients, state, tensors, ADD)


@triton.jit
def apply_kernel(param, grad, exp_avg, exp_avg_sq, ema, chunks, segments, hyper, partial, telemetry, coefficients, state,
                 tickets, EMA: tl.constexpr, CLEAR: tl.constexpr, TILE: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """Pass two. Bytes: 32 an element with moments and weights, 8 for the average, 4 to clear the gradient."""
    program = tl.program_id(0)
    row = chunks + program * K_COUNT
    start = tl.multiple_of(tl.load(row + K_START), 64)
    length = tl.multiple_of(tl.load(row + K_LENGTH), 64)
    segment = tl.load(row + K_SEGMENT)
    lane = tl.arange(0, TILE)
    if tl.load(state + S_SKIP) > 0:
        if CLEAR:
            for begin in range(0, length, TILE):
                offset = begin + lane
                tl.store(grad + start + offset, tl.zeros([TILE], dtype=tl.float32), mask=offset < length)
    else:
        c = coefficients + segment * C_COUNT
        scale = tl.load(c + C_GRADIENT)
        decay = tl.load(c + C_DECAY)
        l2 = tl.load(c + C_L2)
        moment1 = tl.load(c + C_MOMENT1)
        beta2 = tl.load(c + C_BETA2)
        moment2 = tl.load(c + C_MOMENT2)
        step = tl.load(c + C_STEP)
        root = tl.load(c + C_ROOT)
        eps = tl.load(c + C_EPS)
        average = tl.load(state + S_EMA_WEIGHT).to(tl.float32)
        weight = tl.zeros([TILE], dtype=tl.float32)
        change = tl.zeros([TILE], dtype=tl.float32)
        for begin in range(0, length, TILE):
            offset = begin + lane
            inside = offset < length
            at = start + offset
            p = tl.load(param + at, mask=inside, other=0.0)
            g = tl.load(grad + at, mask=inside, other=0.0)
            m = tl.load(exp_avg + at, mask=inside, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
            g = g * scale + l2 * p
            m = m + moment1 * (g - m)
            v = v * beta2 + moment2 * g * g
            new = p * decay - step * m / (tl.sqrt(v) * root + eps)
            tl.store(exp_avg + at, m, mask=inside)
            tl.store(exp_avg_sq + at, v, mask=inside)
            tl.store(param + at, new, mask=inside)
            if EMA:
                e = tl.load(ema + at, mask=inside, other=0.0)
                tl.store(ema + at, e + average * (new - e), mask=inside)
            if CLEAR:
                tl.store(grad + at, tl.zeros([TILE], dtype=tl.float32), mask=inside)
            weight += new * new
            change += (new - p) * (new - p)
        if tl.load(hyper + H_TELEMETRY) > 0:
            tl.store(partial + 2 * program, tl.sum(weight, axis=0).to(tl.float64))
            tl.store(partial + 2 * program + 1, tl.sum(change, axis=0).to(tl.float64))
            count = tl.load(segments + segment * N_COUNT + N_CHUNKS).to(tl.int32)
            if _is_last(tickets + segment, count):
                a, b = _add_partials(partial, tl.load(segments + segment * N_COUNT + N_FIRST_CHUNK), count, ADD)
                tl.store(telemetry + segment * T_COUNT + T_WEIGHT_NORM, tl.sqrt(a).to(tl.float32))
                tl.store(telemetry + segment * T_COUNT + T_UPDATE_NORM, tl.sqrt(b).to(tl.float32))


@triton.jit
def _source(address, half, offset, inside, ALIGN: tl.constexpr):
    """Elements of a gradient at an address: bfloat16 where `half`, else float32; float32 out."""
    if half != 0:
        narrow = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), ALIGN)
        x = tl.load(narrow + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        wide = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN)
        x = tl.load(wide + offset, mask=inside, other=0.0)
    return x


@triton.jit
def accumulate_kernel(addresses, numels, halves, grad, chunks, segments, hyper, partial, sums, state, tickets, scales, tensors,
                      OVERWRITE: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
                      ADD: tl.constexpr):  # fmt: skip
    """grad <- (0 or grad) + scale * source. Bytes: 4 or 2 read, 4 read unless OVERWRITE, 4 written an element."""
    row = chunks + tl.program_id(0) * K_COUNT
    start = tl.multiple_of(tl.load(row + K_START), 64)
    length = tl.multiple_of(tl.load(row + K_LENGTH), 64)
    segment = tl.load(row + K_SEGMENT)
    skipped = tl.multiple_of(start - tl.load(segments + segment * N_COUNT + N_START), 64)
    left = tl.minimum(tl.load(numels + segment) - skipped, length)
    address = tl.load(addresses + segment)
    half = tl.load(halves + segment)
    offset = tl.arange(0, CHUNK)
    if ALIGNED and left % 64 == 0:  # a mask that may end inside a vector would make every load a narrow one
        x = _source(address, half, skipped + offset, offset < tl.multiple_of(left, 64), 16)
    else:
        x = _source(address, half, skipped + offset, offset < left, 1)
    x = x * tl.load(scales)
    if not OVERWRITE:
        x += tl.load(grad + start + offset, mask=offset < length, other=0.0)
    tl.store(grad + start + offset, x, mask=offset < length)
    if NORM:
        total, bad = _chunk_sums(x)
        _finish(
            total,
            bad,
            segment,
            segments,
            hyper,
            partial,
            sums,
            hyper,
            hyper,
            hyper,
            state,
            tickets,
            tensors,
            False,
            ADD,
        )


def measure(
    grad: Tensor, chunks: Tensor, segments: Tensor, hyper: Tensor, partial: Tensor, sums: Tensor, telemetry: Tensor,
    steps: Tensor, coefficients: Tensor, state: Tensor, tickets: Tensor, finish: bool,
) -> None:  # fmt: skip
    measure_kernel[(chunks.shape[0],)](
        grad, chunks, segments, hyper, partial, sums, telemetry, steps, coefficients, state, tickets, segments.shape[0],
        FINISH=finish, CHUNK=CHUNK, ADD=ADD, num_warps=WARPS,
    )  # fmt: skip


def decide(
    segments: Tensor, hyper: Tensor, sums: Tensor, telemetry: Tensor, steps: Tensor, coefficients: Tensor, state: Tensor
) -> None:
    decide_kernel[(1,)](
        segments, hyper, sums, telemetry, steps, coefficients, state, segments.shape[0], ADD=ADD, num_warps=WARPS
    )


def apply(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor | None, chunks: Tensor, segments: Tensor,
    hyper: Tensor, partial: Tensor, telemetry: Tensor, coefficients: Tensor, state: Tensor, tickets: Tensor, clear: bool,
) -> None:  # fmt: skip
    apply_kernel[(chunks.shape[0],)](
        param, grad, exp_avg, exp_avg_sq, param if ema is None else ema, chunks, segments, hyper, partial, telemetry,
        coefficients, state, tickets, EMA=ema is not None, CLEAR=clear, TILE=TILE, ADD=ADD, num_warps=WARPS,
    )  # fmt: skip


def _to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def accumulate(
    gradients: list[Tensor], starts: list[int], grad: Tensor, chunks: Tensor, segments: Tensor, partial: Tensor, sums: Tensor,
    state: Tensor, tickets: Tensor, scale: float, overwrite: bool, norm: bool,
) -> None:  # fmt: skip
    addresses = [g.data_ptr() for g in gradients]
    table = _to_device(addresses, torch.int64, grad.device)
    numels = _to_device([g.numel() for g in gradients], torch.int64, grad.device)
    halves = _to_device([g.dtype == torch.bfloat16 for g in gradients], torch.int32, grad.device)
    accumulate_kernel[(chunks.shape[0],)](
        table, numels, halves, grad, chunks, segments, state, partial, sums, state, tickets, _to_device([scale], torch.float32, grad.device),
        segments.shape[0], OVERWRITE=overwrite, NORM=norm, ALIGNED=all(a % 16 == 0 for a in addresses), CHUNK=CHUNK, ADD=ADD, num_warps=WARPS,
    )  # fmt: skip
