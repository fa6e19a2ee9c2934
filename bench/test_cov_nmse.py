"""Covariance NMSE against what one would write in PyTorch: eager and compiled dense chain, and the Gram form in torch.

Run: pytest bench/test_cov_nmse.py (add --benchmark-json FILE). Q = 10, K = 5; value and gradient of the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import record
from torch import Tensor

import ris_fast
from ris_fast.kernels.cov_nmse import plain, reference
from ris_fast.kernels.cov_nmse.samples import cost, random_tensors
from ris_fast.timing import alternate, peak_bytes

BATCHES, ELEMENTS = (64, 512, 4096), (64, 144, 256, 576, 1024)
ROUNDS = {"quiet": 200, "seconds": 4.0, "least": 5}
CPU_CELLS = 64 * 1024 * 1024  # B N^2 above which a case is left to the GPU
CHAIN_BYTES = 160  # the eager chain's memory per entry of R: about ten complex arrays, forward and backward
PLAIN = (None, None, 0.0, 0.0, 0.0, 0.0)


def budget(device: torch.device) -> float:
    return 0.6 * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 3e9


def inputs(b: int, n: int, dense: bool, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    drawn = random_tensors(min(b, 64), n, 10, 5, 0, dense)
    repeated = [
        None if drawn[k] is None else drawn[k].float().repeat(b // min(b, 64), 1, 1, 1).to(device)
        for k in ("factor", "target_factor", "target_cov")
    ]
    return repeated[0].requires_grad_(), repeated[1], repeated[2]


class PlainGram(torch.autograd.Function):
    """The closed form in plain torch, with its own gradient: the best that one would assemble without a kernel."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, target_factor: Tensor | None, target_cov: Tensor | None) -> Tensor:
        loss, unit, _ = plain.cov_nmse(factor, target_factor, target_cov, *PLAIN, 1)
        ctx.save_for_backward(unit)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, None, None, None] * ctx.saved_tensors[0], None, None


def losses(f: Tensor, s: Tensor | None, t: Tensor | None, rivals: bool) -> dict[str, Callable[[], Tensor]]:
    """0-d losses by name; `ours` last, so that a rival's allocations are not ours."""
    chain = lambda x, a, c: reference.cov_nmse(x, a, c, *PLAIN).mean()  # noqa: E731
    found: dict[str, Callable[[], Tensor]] = {"torch gram": lambda: PlainGram.apply(f, s, t).mean()}
    if rivals:
        compiled = torch.compile(chain, dynamic=False)
        found = {"eager": lambda: chain(f, s, t), "compiled": lambda: compiled(f, s, t)} | found
    return found | {"ours": lambda: ris_fast.cov_nmse(f, target_factor=s, target_cov=t)}


def both(f: Tensor, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        f.grad = None
        loss().backward()

    return run


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("n", ELEMENTS)
@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("target", ["low-rank", "dense"])
def test_cov_nmse(
    benchmark: Any, device: torch.device, threads: int, bandwidth: float, target: str, b: int, n: int
) -> None:
    dense = target == "dense"
    if device.type == "cpu" and b * n * n > CPU_CELLS:
        pytest.skip("left to the GPU: too long for a CPU")
    if dense and 8 * b * n * n > budget(device):
        pytest.skip("the dense target alone does not fit")
    f, s, t = inputs(b, n, dense, device)
    rivals = CHAIN_BYTES * b * n * n <= budget(device)
    torch.compiler.reset()
    named = losses(f, s, t, rivals)
    found = alternate({name: both(f, loss) for name, loss in named.items()}, device, **ROUNDS)
    forward = alternate({"ours": named["ours"]}, device, **ROUNDS | {"seconds": 0.5})["ours"]["s"]
    with torch.no_grad():
        value_only = alternate({"ours": named["ours"]}, device, **ROUNDS | {"seconds": 0.5})["ours"]["s"]
    work = cost(f, s, t, *PLAIN, 1)
    seconds = found["ours"]["s"]
    record(
        benchmark, found, "ours", threads=threads, device=str(device), rivals_left_out="" if rivals else "their memory",
        forward_s=forward, backward_s=seconds - forward, value_only_s=value_only,
        peak_bytes={name: peak_bytes(both(f, loss), device) for name, loss in named.items()},
        bytes=work.bytes, flops=work.flops,
        gbytes_per_s=work.bytes / seconds / 1e9, gflop_per_s=work.flops / seconds / 1e9,
        share_of_copy_bandwidth=work.bytes / seconds / bandwidth, scenes_per_s=b / seconds,
    )  # fmt: skip
    benchmark.pedantic(both(f, named["ours"]), rounds=5, warmup_rounds=1)


def test_growth_with_elements(benchmark: Any, device: torch.device, threads: int) -> None:
    """Low-rank, B = 64: N = 144 and N = 1024 alternating; the ratio is the point."""
    pairs = {n: inputs(64, n, False, device) for n in (144, 1024)}
    runs = {f"N={n}": both(f, losses(f, s, t, False)["ours"]) for n, (f, s, t) in pairs.items()}
    record(benchmark, alternate(runs, device, **ROUNDS), "N=144", threads=threads, device=str(device))
    benchmark.pedantic(runs["N=1024"], rounds=5, warmup_rounds=1)
