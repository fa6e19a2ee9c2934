"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU: no spills, registers in bounds, wide
loads."""

from __future__ import annotations

import pytest

from ris_fast.kernels.registry import AotCase, families

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
from ris_fast.kernels.native.aot import compile_case  # noqa: E402

CASES = {f"{family.name}/{case.name}": case for family in families() for case in family.aot()}
ARCHITECTURES = (80, 90, 100)


def test_aot_lists_every_family_with_a_triton_backend() -> None:
    for family in families():
        has_triton = any("triton" in operator.backends for operator in family.operators)
        assert bool(family.aot()) == has_triton, family.name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_aot_kernels_do_not_spill(case: str, arch: int) -> None:
    chosen: AotCase = CASES[case]
    report = compile_case(chosen, arch)
    assert report.spills == 0, report
    assert report.registers <= chosen.max_registers, report
    assert report.wide > 0 or not chosen.wide, report
