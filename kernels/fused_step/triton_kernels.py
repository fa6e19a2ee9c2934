"""The fused step on CUDA: two launches a step, one program a chunk; formulas in reference.py, slots in layout.py.

Pass one: every program leaves the sum of squares of its chunk; the last program of a tensor adds that tensor's chunks,
the last tensor's program adds the tensors and decides (norm, skip, clip, counters, coefficients). Who is last is found
with counters in `tickets`, but what is added, and in which order, is fixed, so the bits repeat. Pass two updates, and
adds weight and update norms in the same manner. No scalar comes from the host: a Python float would be rounded to
float32. Loads and stores are 128 bits wide because every chunk starts at, and has a length of, a multiple of 64.

Not yet run on a GPU: interpreted on CPU against the reference, and compiled ahead of time for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Accumulate, Apply, Decide, Measure
from .layout import Chunk, Coefficient, Group, Hyper, Segment, State, Telemetry

CHUNK = 4096  # elements a program
TILE = 1024  # elements of a round of pass two: 8 a thread of each of five buffers, which leaves room in the registers
ADD = 256  # partial sums, or tensors, handled at a time
WARPS = 4

# The slots of layout.py that the kernels read and write; Triton sees no enum.
COEFFICIENT_GRADIENT = tl.constexpr(int(Coefficient.GRADIENT))
COEFFICIENT_DECAY = tl.constexpr(int(Coefficient.DECAY))
COEFFICIENT_L2 = tl.constexpr(int(Coefficient.L2))
COEFFICIENT_MOMENT1 = tl.constexpr(int(Coefficient.MOMENT1))
COEFFICIENT_BETA2 = tl.constexpr(int(Coefficient.BETA2))
COEFFICIENT_MOMENT2 = tl.constexpr(int(Coefficient.MOMENT2))
COEFFICIENT_STEP = tl.constexpr(int(Coefficient.STEP))
COEFFICIENT_ROOT = tl.constexpr(int(Coefficient.ROOT))
COEFFICIENT_EPS = tl.constexpr(int(Coefficient.EPS))
COEFFICIENT_COUNT = tl.constexpr(int(Coefficient.COUNT))
STATE_ATTEMPTED = tl.constexpr(int(State.ATTEMPTED))
STATE_APPLIED = tl.constexpr(int(State.APPLIED))
STATE_SKIPPED = tl.constexpr(int(State.SKIPPED))
STATE_CLIPPED = tl.constexpr(int(State.CLIPPED))
STATE_NORM = tl.constexpr(int(State.NORM))
STATE_CLIP = tl.constexpr(int(State.CLIP))
STATE_SCALE = tl.constexpr(int(State.SCALE))
STATE_GROWTH = tl.constexpr(int(State.GROWTH))
STATE_EXTERNAL_SCALE = tl.constexpr(int(State.EXTERNAL_SCALE))
STATE_EXTERNAL_BAD = tl.constexpr(int(State.EXTERNAL_BAD))
STATE_SKIP = tl.constexpr(int(State.SKIP))
STATE_EMA_WEIGHT = tl.constexpr(int(State.EMA_WEIGHT))
STATE_FIRST_BAD = tl.constexpr(int(State.FIRST_BAD))
STATE_SUMSQ = tl.constexpr(int(State.SUMSQ))
STATE_BAD = tl.constexpr(int(State.BAD))
HYPER_MAX_NORM = tl.constexpr(int(Hyper.MAX_NORM))
HYPER_EMA_DECAY = tl.constexpr(int(Hyper.EMA_DECAY))
HYPER_EMA_WARMUP = tl.constexpr(int(Hyper.EMA_WARMUP))
HYPER_TELEMETRY = tl.constexpr(int(Hyper.TELEMETRY))
HYPER_DYNAMIC = tl.constexpr(int(Hyper.DYNAMIC))
HYPER_GROWTH_INTERVAL = tl.constexpr(int(Hyper.GROWTH_INTERVAL))
HYPER_GROUPS = tl.constexpr(int(Hyper.GROUPS))
GROUP_LR = tl.constexpr(int(Group.LR))
GROUP_BETA1 = tl.constexpr(int(Group.BETA1))
GROUP_BETA2 = tl.constexpr(int(Group.BETA2))
GROUP_EPS = tl.constexpr(int(Group.EPS))
GROUP_WEIGHT_DECAY = tl.constexpr(int(Group.WEIGHT_DECAY))
GROUP_SIGN = tl.constexpr(int(Group.SIGN))
GROUP_DECOUPLED = tl.constexpr(int(Group.DECOUPLED))
GROUP_COUNT = tl.constexpr(int(Group.COUNT))
TELEMETRY_GRAD_NORM = tl.constexpr(int(Telemetry.GRAD_NORM))
TELEMETRY_WEIGHT_NORM = tl.constexpr(int(Telemetry.WEIGHT_NORM))
TELEMETRY_UPDATE_NORM = tl.constexpr(int(Telemetry.UPDATE_NORM))
TELEMETRY_NONFINITE = tl.constexpr(int(Telemetry.NONFINITE))
TELEMETRY_COUNT = tl.constexpr(int(Telemetry.COUNT))
SEGMENT_FIRST_CHUNK = tl.constexpr(int(Segment.FIRST_CHUNK))
SEGMENT_CHUNKS = tl.constexpr(int(Segment.CHUNKS))
SEGMENT_GROUP = tl.constexpr(int(Segment.GROUP))
SEGMENT_START = tl.constexpr(int(Segment.START))
SEGMENT_COUNT = tl.constexpr(int(Segment.COUNT))
CHUNK_START = tl.constexpr(int(Chunk.START))
CHUNK_LENGTH = tl.constexpr(int(Chunk.LENGTH))
CHUNK_SEGMENT = tl.constexpr(int(Chunk.SEGMENT))
CHUNK_COUNT = tl.constexpr(int(Chunk.COUNT))


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
def _add_partials(partial_ptr, first, count, ADD: tl.constexpr):
    """Sums of the two columns of `partial` over `count` chunks, in an order that depends on `count` alone."""
    lane = tl.arange(0, ADD)
    a = tl.zeros([ADD], dtype=tl.float64)
    b = tl.zeros([ADD], dtype=tl.float64)
    for begin in range(0, count, ADD):
        inside = begin + lane < count
        at = partial_ptr + 2 * (first + begin + lane)
        a += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        b += tl.load(at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(a, axis=0), tl.sum(b, axis=0)


@triton.jit
def _is_last(ticket_ptr, count):
    """Counts this program; true for the last of `count`. The barrier puts all its stores before the count."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1) == count - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def _add_tensors(sums_ptr, segments_ptr, tensors, ADD: tl.constexpr):
    """Totals over tensors, and the first tensor with a non-finite value (or -1); clears the rows of tensors without
    gradient."""
    lane = tl.arange(0, ADD)
    a = tl.zeros([ADD], dtype=tl.float64)
    b = tl.zeros([ADD], dtype=tl.float64)
    first = tl.full([ADD], 2147483647, dtype=tl.int32)
    for begin in range(0, tensors, ADD):
        t = begin + lane
        inside = t < tensors
        live = inside & (tl.load(segments_ptr + t * SEGMENT_COUNT + SEGMENT_CHUNKS, mask=inside, other=0) > 0)
        square = tl.load(sums_ptr + 2 * t, mask=live, other=0.0, cache_modifier=".cg")
        bad = tl.load(sums_ptr + 2 * t + 1, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(sums_ptr + 2 * t, square, mask=inside & (live == 0))
        tl.store(sums_ptr + 2 * t + 1, bad, mask=inside & (live == 0))
        a += square
        b += bad
        first = tl.minimum(first, tl.where(bad > 0, t, 2147483647))
    least = tl.min(first, axis=0)
    return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.where(least == 2147483647, -1, least)


@triton.jit
def _decide(sumsq, bad, first_bad, segments_ptr, sums_ptr, state_ptr, outputs, tensors, ADD: tl.constexpr):
    """`decide` of the reference: scalars first, then a row of coefficients per tensor.

    outputs: pointers to hyper, telemetry, steps and coefficients.
    """
    hyper_ptr, telemetry_ptr, steps_ptr, coefficients_ptr = outputs
    scale = tl.load(state_ptr + STATE_SCALE) * tl.load(state_ptr + STATE_EXTERNAL_SCALE)
    norm = tl.sqrt(sumsq) / scale
    skip = ((bad + tl.load(state_ptr + STATE_EXTERNAL_BAD)) > 0) | ((norm < float("inf")) == 0)
    taken = tl.where(skip, 0.0, 1.0).to(tl.float64)
    limit = tl.load(hyper_ptr + HYPER_MAX_NORM) / (norm + 1e-6)
    clip = tl.where(limit > 1.0, 1.0, limit)
    applied = tl.load(state_ptr + STATE_APPLIED) + taken
    tl.debug_barrier()  # every warp has read the loss scale before one of them stores the next
    tl.store(state_ptr + STATE_ATTEMPTED, tl.load(state_ptr + STATE_ATTEMPTED) + 1.0)
    tl.store(state_ptr + STATE_APPLIED, applied)
    tl.store(state_ptr + STATE_SKIPPED, tl.load(state_ptr + STATE_SKIPPED) + 1.0 - taken)
    tl.store(state_ptr + STATE_CLIPPED, tl.load(state_ptr + STATE_CLIPPED) + tl.where(clip < 1.0, taken, 0.0))
    tl.store(state_ptr + STATE_NORM, norm)
    tl.store(state_ptr + STATE_CLIP, clip)
    tl.store(state_ptr + STATE_SKIP, 1.0 - taken)
    tl.store(
        state_ptr + STATE_FIRST_BAD, tl.where(skip, first_bad.to(tl.float64), tl.load(state_ptr + STATE_FIRST_BAD))
    )
    decay = tl.load(hyper_ptr + HYPER_EMA_DECAY)
    warm = tl.minimum(decay, (1.0 + applied) / (10.0 + applied))
    tl.store(state_ptr + STATE_EMA_WEIGHT, 1.0 - tl.where(tl.load(hyper_ptr + HYPER_EMA_WARMUP) > 0, warm, decay))
    growth = (tl.load(state_ptr + STATE_GROWTH) + 1.0) * taken
    grow = growth >= tl.load(hyper_ptr + HYPER_GROWTH_INTERVAL)
    dynamic = tl.load(hyper_ptr + HYPER_DYNAMIC) > 0
    factor = tl.where(skip, 0.5, tl.where(grow, 2.0, 1.0))
    tl.store(state_ptr + STATE_SCALE, tl.load(state_ptr + STATE_SCALE) * tl.where(dynamic, factor, 1.0))
    tl.store(state_ptr + STATE_GROWTH, tl.where(dynamic & (grow == 0), growth, 0.0))

    lane = tl.arange(0, ADD)
    for begin in range(0, tensors, ADD):
        t = begin + lane
        inside = t < tensors
        segment = segments_ptr + t * SEGMENT_COUNT
        moved = tl.where(tl.load(segment + SEGMENT_CHUNKS, mask=inside, other=0) > 0, taken, 0.0)
        square = tl.load(sums_ptr + 2 * t, mask=inside, other=0.0, cache_modifier=".cg")
        count = tl.load(sums_ptr + 2 * t + 1, mask=inside, other=0.0, cache_modifier=".cg")
        row = telemetry_ptr + t * TELEMETRY_COUNT
        tl.store(row + TELEMETRY_GRAD_NORM, (tl.sqrt(square) / scale).to(tl.float32), mask=inside)
        tl.store(row + TELEMETRY_NONFINITE, count.to(tl.float32), mask=inside)
        tl.store(row + TELEMETRY_UPDATE_NORM, tl.zeros([ADD], dtype=tl.float32), mask=inside & (moved == 0))
        step = tl.load(steps_ptr + t, mask=inside, other=0.0) + moved.to(tl.float32)
        tl.store(steps_ptr + t, step, mask=inside)
        age = tl.maximum(step, 1.0).to(tl.float64)
        group = hyper_ptr + HYPER_GROUPS + tl.load(segment + SEGMENT_GROUP, mask=inside, other=0) * GROUP_COUNT
        lr = tl.load(group + GROUP_LR)
        beta1 = tl.load(group + GROUP_BETA1)
        beta2 = tl.load(group + GROUP_BETA2)
        penalty = tl.load(group + GROUP_WEIGHT_DECAY)
        decoupled = tl.load(group + GROUP_DECOUPLED) > 0
        power1 = tl.exp(age * tl.log(beta1))  # of 0: exp(-inf) = 0
        power2 = tl.exp(age * tl.log(beta2))
        out = coefficients_ptr + t * COEFFICIENT_COUNT
        tl.store(out + COEFFICIENT_GRADIENT, (tl.load(group + GROUP_SIGN) * clip / scale).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_DECAY, tl.where(decoupled, 1.0 - lr * penalty, 1.0).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_L2, tl.where(decoupled, 0.0, penalty).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_MOMENT1, (1.0 - beta1).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_BETA2, beta2.to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_MOMENT2, (1.0 - beta2).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_STEP, (lr / (1.0 - power1)).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_ROOT, (1.0 / tl.sqrt(1.0 - power2)).to(tl.float32), mask=inside)
        tl.store(out + COEFFICIENT_EPS, tl.load(group + GROUP_EPS).to(tl.float32), mask=inside)


@triton.jit
def _finish(total, bad, segment, work, outputs, tensors, FINISH: tl.constexpr, ADD: tl.constexpr):
    """Leaves a chunk's sums; the last chunk of a tensor adds the tensor, the last tensor adds all and decides.

    work: pointers to segments, partial, sums, state and tickets; outputs: as for `_decide`, unread without FINISH.
    """
    segments_ptr, partial_ptr, sums_ptr, state_ptr, tickets_ptr = work
    program = tl.program_id(0)
    tl.store(partial_ptr + 2 * program, total)
    tl.store(partial_ptr + 2 * program + 1, bad)
    count = tl.load(segments_ptr + segment * SEGMENT_COUNT + SEGMENT_CHUNKS).to(tl.int32)
    if _is_last(tickets_ptr + segment, count):
        square, wrong = _add_partials(
            partial_ptr, tl.load(segments_ptr + segment * SEGMENT_COUNT + SEGMENT_FIRST_CHUNK), count, ADD
        )
        tl.store(sums_ptr + 2 * segment, square)
        tl.store(sums_ptr + 2 * segment + 1, wrong)
        if _is_last(tickets_ptr + tensors, tl.load(tickets_ptr + tensors + 1)):
            sumsq, all_bad, first_bad = _add_tensors(sums_ptr, segments_ptr, tensors, ADD)
            tl.store(state_ptr + STATE_SUMSQ, sumsq)
            tl.store(state_ptr + STATE_BAD, all_bad)
            if FINISH:
                _decide(sumsq, all_bad, first_bad, segments_ptr, sums_ptr, state_ptr, outputs, tensors, ADD)


@triton.jit
def measure_kernel(
    grad_ptr,
    chunks_ptr,
    segments_ptr,
    hyper_ptr,
    partial_ptr,
    sums_ptr,
    telemetry_ptr,
    steps_ptr,
    coefficients_ptr,
    state_ptr,
    tickets_ptr,
    tensors,
    FINISH: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Pass one. Bytes: 4 an element."""
    row = chunks_ptr + tl.program_id(0) * CHUNK_COUNT
    start = tl.multiple_of(tl.load(row + CHUNK_START), 64)
    length = tl.multiple_of(tl.load(row + CHUNK_LENGTH), 64)
    offset = tl.arange(0, CHUNK)
    x = tl.load(grad_ptr + start + offset, mask=offset < length, other=0.0)
    total, bad = _chunk_sums(x)
    work = segments_ptr, partial_ptr, sums_ptr, state_ptr, tickets_ptr
    outputs = hyper_ptr, telemetry_ptr, steps_ptr, coefficients_ptr
    _finish(total, bad, tl.load(row + CHUNK_SEGMENT), work, outputs, tensors, FINISH, ADD)


@triton.jit
def decide_kernel(
    segments_ptr, hyper_ptr, sums_ptr, telemetry_ptr, steps_ptr, coefficients_ptr, state_ptr, tensors, ADD: tl.constexpr
):
    """The decision alone, on totals that somebody else may have added up over several buffers. One program."""
    sumsq = tl.load(state_ptr + STATE_SUMSQ)
    bad = tl.load(state_ptr + STATE_BAD)
    _, _, first_bad = _add_tensors(sums_ptr, segments_ptr, tensors, ADD)
    outputs = hyper_ptr, telemetry_ptr, steps_ptr, coefficients_ptr
    _decide(sumsq, bad, first_bad, segments_ptr, sums_ptr, state_ptr, outputs, tensors, ADD)


@triton.jit
def apply_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    ema_ptr,
    chunks_ptr,
    segments_ptr,
    hyper_ptr,
    partial_ptr,
    telemetry_ptr,
    coefficients_ptr,
    state_ptr,
    tickets_ptr,
    EMA: tl.constexpr,
    CLEAR: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
):
    """Pass two. Bytes: 32 an element with moments and weights, 8 for the average, 4 to clear the gradient."""
    program = tl.program_id(0)
    row = chunks_ptr + program * CHUNK_COUNT
    start = tl.multiple_of(tl.load(row + CHUNK_START), 64)
    length = tl.multiple_of(tl.load(row + CHUNK_LENGTH), 64)
    segment = tl.load(row + CHUNK_SEGMENT)
    lane = tl.arange(0, TILE)
    if tl.load(state_ptr + STATE_SKIP) > 0:
        if CLEAR:
            for begin in range(0, length, TILE):
                offset = begin + lane
                tl.store(grad_ptr + start + offset, tl.zeros([TILE], dtype=tl.float32), mask=offset < length)
    else:
        c = coefficients_ptr + segment * COEFFICIENT_COUNT
        scale = tl.load(c + COEFFICIENT_GRADIENT)
        decay = tl.load(c + COEFFICIENT_DECAY)
        l2 = tl.load(c + COEFFICIENT_L2)
        moment1 = tl.load(c + COEFFICIENT_MOMENT1)
        beta2 = tl.load(c + COEFFICIENT_BETA2)
        moment2 = tl.load(c + COEFFICIENT_MOMENT2)
        step = tl.load(c + COEFFICIENT_STEP)
        root = tl.load(c + COEFFICIENT_ROOT)
        eps = tl.load(c + COEFFICIENT_EPS)
        average = tl.load(state_ptr + STATE_EMA_WEIGHT).to(tl.float32)
        weight = tl.zeros([TILE], dtype=tl.float32)
        change = tl.zeros([TILE], dtype=tl.float32)
        for begin in range(0, length, TILE):
            offset = begin + lane
            inside = offset < length
            at = start + offset
            p = tl.load(param_ptr + at, mask=inside, other=0.0)
            g = tl.load(grad_ptr + at, mask=inside, other=0.0)
            m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
            v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)
            g = g * scale + l2 * p
            m = m + moment1 * (g - m)
            v = v * beta2 + moment2 * g * g
            new = p * decay - step * m / (tl.sqrt(v) * root + eps)
            tl.store(exp_avg_ptr + at, m, mask=inside)
            tl.store(exp_avg_sq_ptr + at, v, mask=inside)
            tl.store(param_ptr + at, new, mask=inside)
            if EMA:
                e = tl.load(ema_ptr + at, mask=inside, other=0.0)
                tl.store(ema_ptr + at, e + average * (new - e), mask=inside)
            if CLEAR:
                tl.store(grad_ptr + at, tl.zeros([TILE], dtype=tl.float32), mask=inside)
            weight += new * new
            change += (new - p) * (new - p)
        if tl.load(hyper_ptr + HYPER_TELEMETRY) > 0:
            tl.store(partial_ptr + 2 * program, tl.sum(weight, axis=0).to(tl.float64))
            tl.store(partial_ptr + 2 * program + 1, tl.sum(change, axis=0).to(tl.float64))
            count = tl.load(segments_ptr + segment * SEGMENT_COUNT + SEGMENT_CHUNKS).to(tl.int32)
            if _is_last(tickets_ptr + segment, count):
                a, b = _add_partials(
                    partial_ptr, tl.load(segments_ptr + segment * SEGMENT_COUNT + SEGMENT_FIRST_CHUNK), count, ADD
                )
                tl.store(telemetry_ptr + segment * TELEMETRY_COUNT + TELEMETRY_WEIGHT_NORM, tl.sqrt(a).to(tl.float32))
                tl.store(telemetry_ptr + segment * TELEMETRY_COUNT + TELEMETRY_UPDATE_NORM, tl.sqrt(b).to(tl.float32))


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
def accumulate_kernel(
    addresses_ptr,
    numels_ptr,
    halves_ptr,
    grad_ptr,
    chunks_ptr,
    segments_ptr,
    partial_ptr,
    sums_ptr,
    state_ptr,
    tickets_ptr,
    scales_ptr,
    tensors,
    OVERWRITE: tl.constexpr,
    NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
):
    """grad <- (0 or grad) + scale * source. Bytes: 4 or 2 read, 4 read unless OVERWRITE, 4 written an element."""
    row = chunks_ptr + tl.program_id(0) * CHUNK_COUNT
    start = tl.multiple_of(tl.load(row + CHUNK_START), 64)
    length = tl.multiple_of(tl.load(row + CHUNK_LENGTH), 64)
    segment = tl.load(row + CHUNK_SEGMENT)
    skipped = tl.multiple_of(start - tl.load(segments_ptr + segment * SEGMENT_COUNT + SEGMENT_START), 64)
    left = tl.minimum(tl.load(numels_ptr + segment) - skipped, length)
    address = tl.load(addresses_ptr + segment)
    half = tl.load(halves_ptr + segment)
    offset = tl.arange(0, CHUNK)
    if ALIGNED and left % 64 == 0:  # a mask that may end inside a vector would make every load a narrow one
        x = _source(address, half, skipped + offset, offset < tl.multiple_of(left, 64), 16)
    else:
        x = _source(address, half, skipped + offset, offset < left, 1)
    x = x * tl.load(scales_ptr)
    if not OVERWRITE:
        x += tl.load(grad_ptr + start + offset, mask=offset < length, other=0.0)
    tl.store(grad_ptr + start + offset, x, mask=offset < length)
    if NORM:
        total, bad = _chunk_sums(x)
        work = segments_ptr, partial_ptr, sums_ptr, state_ptr, tickets_ptr
        _finish(total, bad, segment, work, (), tensors, False, ADD)


def measure(*args: Any) -> None:
    *tensors, finish = Measure(*args)
    _, chunks, segments, *_ = tensors
    measure_kernel[(len(chunks),)](*tensors, len(segments), FINISH=finish, CHUNK=CHUNK, ADD=ADD, num_warps=WARPS)


def decide(*args: Any) -> None:
    a = Decide(*args)
    decide_kernel[(1,)](*a, len(a.segments), ADD=ADD, num_warps=WARPS)


def apply(*args: Any) -> None:
    a = Apply(*args)
    *tensors, clear = a._replace(ema=a.param) if a.ema is None else a
    options = {"EMA": a.ema is not None, "CLEAR": clear, "TILE": TILE, "ADD": ADD}
    apply_kernel[(len(a.chunks),)](*tensors, **options, num_warps=WARPS)


def _to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def accumulate(*args: Any) -> None:
    a = Accumulate(*args)
    device, addresses = a.grad.device, [g.data_ptr() for g in a.gradients]
    table = _to_device(addresses, torch.int64, device)
    numels = _to_device([g.numel() for g in a.gradients], torch.int64, device)
    halves = _to_device([g.dtype == torch.bfloat16 for g in a.gradients], torch.int32, device)
    scale = _to_device([a.scale], torch.float32, device)
    _, _, *tensors, _, overwrite, norm = a
    options = {"OVERWRITE": overwrite, "NORM": norm, "ALIGNED": all(at % 16 == 0 for at in addresses)}
    accumulate_kernel[(len(a.chunks),)](
        table, numels, halves, *tensors, scale, len(a.segments), **options, CHUNK=CHUNK, ADD=ADD, num_warps=WARPS
    )
