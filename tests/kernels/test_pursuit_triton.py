"""The pursuit's Triton kernels without a GPU: their laws under the interpreter, how many launches and bytes a call
takes, and what they leave to plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_fast import environment
from ris_fast.kernels.pursuit import op
from ris_fast.kernels.pursuit.samples import SAMPLES, scenes, triton_bytes
from tests.kernels.launch_count import counted, on_meta
from tests.kernels.old_interpreter import skip_interpreter_of_old_triton
from tests.kernels.test_pursuit_kernel import no_factors

pytest.importorskip("triton", reason="the kernels are triton's")
NAMED = {sample.name: sample for sample in SAMPLES}
MOST_LAUNCHES, MOST_BYTES = (
    {False: 22, True: 37},
    3.3e6,
)  # a micro-batch, by wavefront; a scene, each array once a launch


@pytest.mark.slow
def test_pursuit_triton_obeys_its_laws_under_the_interpreter() -> None:
    laws = Path(__file__).with_name("interpreted_pursuit.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(laws)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    skip_interpreter_of_old_triton(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """autocast does not know the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())


@pytest.mark.parametrize("spherical", [False, True], ids=["fresnel", "spherical"])
def test_pursuit_triton_takes_few_launches_and_bytes(
    spherical: bool, monkeypatch: pytest.MonkeyPatch, no_autocast: None
) -> None:
    """The standard task; the count does not depend on the batch, the bytes grow with it and hardly beyond."""
    args = {batch: on_meta(scenes(batch, 12, 12, 16, 16, 5, spherical=spherical)) for batch in (64, 256)}
    found = {}
    for batch, given in args.items():
        with counted(monkeypatch) as found[batch]:
            op._triton(*given)
    few, many = found.values()
    counted_bytes, formula = (many.bytes - few.bytes) / (256 - 64), triton_bytes(16, 16, 144, 5)
    assert len(few) == len(many) <= MOST_LAUNCHES[spherical]
    assert formula <= counted_bytes <= MOST_BYTES
    with counted(monkeypatch) as plain:
        op._plain(*args[64])
    assert len(plain) > 30 * len(few) and plain.bytes > 3 * few.bytes


def compiled_as(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles for a launch: numbers that are 1 are constants, unless they are not specialised."""
    fixed, warps = dict(options), options["num_warps"]
    del fixed["num_warps"]
    free = [kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()]
    ones = {name: 1 for name, value in zip(kernel.arg_names, args) if type(value) is int and value == 1}
    return kernel, tuple(sorted((fixed | {name: 1 for name in ones if name not in free}).items())), warps


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1, 1), (1, 3, 2, 1, 2), (32, 32, 16, 16, 3), (40, 1, 8, 40, 9)], ids=str)
def test_pursuit_triton_compiles_at_other_sizes(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, no_autocast: None
) -> None:
    """Every kernel as a call launches it, for sm_90: what fits together at the standard sizes may not at others."""
    from ris_fast.kernels.native.aot import compile_case
    from ris_fast.kernels.pursuit import aot_cases
    from ris_fast.kernels.registry import aot_case

    args = on_meta(scenes(2, *sizes, sector=0.3 if sizes[0] > 16 else 0.8))
    with counted(monkeypatch) as launches:
        op._triton(*args)
        op._triton(*args[:4], [*args[4][:9], *no_factors(args[4])], 2.0, args[6])
    kinds = {compiled_as(*call) for call in launches.calls}
    every = {case.kernel.fn.__name__ for case in aot_cases.cases()}
    assert {kernel.fn.__name__ for kernel, _, _ in kinds} | {"residual_kernel"} == every
    pointers = [name for name in aot_cases.TYPES if name.endswith("_ptr")]
    for kernel, fixed, warps in kinds:
        compile_case(aot_case(kernel.fn.__name__, kernel, aot_cases.TYPES, dict(fixed), pointers, warps), 90)


@pytest.mark.parametrize("most", ["MOST_ATOMS", "MOST_ELEMENTS"])
def test_pursuit_triton_leaves_large_sizes_to_plain_torch(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = NAMED["small"].make("cpu", torch.float32)
    monkeypatch.setattr(op, most, 1)
    for one, other in zip(op._triton(*args), op._plain(*args), strict=True):
        assert torch.equal(one, other)


def test_pursuit_triton_limits_are_named_where_the_backend_is(monkeypatch: pytest.MonkeyPatch) -> None:
    line = environment._kernel(op.OPERATOR, "cuda", "triton", ("Triton", "triton 3.6"))
    assert line["backend"] == "Triton" and "9 atoms and 4,096 elements, plain torch beyond" in line["reason"]
