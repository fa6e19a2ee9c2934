"""The arguments of the four operators in order: implementations take them flat, as torch gives them, and name them.

gradients, starts           T tensors of any shape, float32 or bfloat16, empty where there is none; first elements
param, grad, exp_avg, exp_avg_sq, ema    (P,) flat buffers; ema may be None
chunks, segments            (C, 3) and (T, 5) int64, see layout.py
hyper, state                (Hyper.GROUPS + Group.COUNT G,) and (State.COUNT,) float64
partial, tickets            (C, 2) float64 and (T + 2,) int32, scratch
sums                        (T, 2) float64: sum of squares and non-finite count
telemetry, steps            (T, 4) and (T,) float32
coefficients                (T, 12), float32, or float64 for float64

native.py, where microseconds of a small step count, spells them out; it alone takes `sources`.
"""

from __future__ import annotations

from collections import namedtuple

TENSORS = {
    "accumulate": "gradients starts grad chunks segments partial sums state tickets".split(),
    "measure": "grad chunks segments hyper partial sums telemetry steps coefficients state tickets".split(),
    "decide": "segments hyper sums telemetry steps coefficients state".split(),
    "apply": (
        "param grad exp_avg exp_avg_sq ema chunks segments hyper partial telemetry coefficients state tickets".split()
    ),
}
Accumulate = namedtuple("Accumulate", [*TENSORS["accumulate"], "scale", "overwrite", "norm"])
Measure = namedtuple("Measure", [*TENSORS["measure"], "finish"])
Decide = namedtuple("Decide", TENSORS["decide"])
Apply = namedtuple("Apply", [*TENSORS["apply"], "clear"])
