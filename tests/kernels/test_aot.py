"""Compiles every Triton kernel for sm_90, and each family's first for sm_80 and sm_100, without a GPU: no spills,
registers in bounds, wide loads."""

from __future__ import annotations

import re

import pytest

from ris_fast.kernels.registry import AotCase, families

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")
from ris_fast.kernels.native.aot import compile_case, compiled  # noqa: E402

CASES = {f"{family.name}/{case.name}": case for family in families() for case in family.aot()}
FIRST = [f"{family.name}/{family.aot()[0].name}" for family in families() if family.aot()]
COMPILED = [*((case, 90) for case in CASES), *((case, arch) for case in FIRST for arch in (80, 100))]


def test_aot_lists_every_family_with_a_triton_backend() -> None:
    for family in families():
        has_triton = any("triton" in operator.backends for operator in family.operators)
        assert bool(family.aot()) == has_triton, family.name


@pytest.mark.slow
@pytest.mark.parametrize("case, arch", COMPILED)
def test_aot_kernels_do_not_spill(case: str, arch: int) -> None:
    chosen: AotCase = CASES[case]
    report = compile_case(chosen, arch)
    assert report.spills == 0, report
    assert report.registers <= chosen.max_registers, report
    assert report.wide > 0 or not chosen.wide, report


@pytest.mark.slow
def test_decide_waits_before_it_stores() -> None:
    """Every warp reads the loss scale and one thread stores the next: without a barrier a warp may read what was just
    written. The first loads in a row are of the table of tensors, the second ones of the state."""
    found = re.findall(r"(ld|st)\.global|(bar)\.sync", compiled(CASES["fused_step/decide"], 90).asm["ptx"])
    events = "".join({"ld": "L", "st": "S", "": "B"}[access] for access, _ in found)
    before_stores = re.findall(r"L{4,}[^S]*S", events)[:2]
    assert len(before_stores) == 2 and all("B" in each for each in before_stores)


@pytest.mark.parametrize("name", ["chunk", "splits", "groups", "rows", "atom", "atoms"])
def test_what_follows_the_batch_is_not_specialised(name: str) -> None:
    """Or a ragged batch and validation would compile kernels of their own, within a timed epoch."""
    kernels = {case.kernel for case in CASES.values() if name in case.kernel.arg_names}
    found = [each for kernel in kernels for each in kernel.params if each.name == name and not each.is_constexpr]
    assert found and all(each.do_not_specialize for each in found)
