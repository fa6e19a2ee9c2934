"""Compiles Triton kernels for GPUs that are not here, and reads registers, spills and load widths from the result.

Needs triton alone (ptxas and the disassembler are in its wheel). Spills show as local loads and stores in the machine
code; no correctness test sees them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..registry import AotCase


@dataclass(frozen=True)
class AotReport:
    """What one compiled kernel uses; spills counts LDL and STL instructions, wide the 128-bit global accesses."""

    name: str
    arch: int
    registers: int
    spills: int
    wide: int
    shared_bytes: int


def _tool(name: str) -> str:
    """Path of a CUDA tool in triton's wheel."""
    return str(getattr(triton.knobs.nvidia, name).path)


def compiled(case: AotCase, arch: int) -> Any:
    """The kernel for compute capability arch (80, 90, 100), as triton returns it: `.asm`, `.metadata`."""
    names = list(case.signature)
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=dict(case.signature), constexprs=dict(case.constexprs), attrs=attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps, "enable_fp_fusion": True}
    )


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile for compute capability arch and measure.

    Raises: whatever triton or ptxas raise; subprocess.CalledProcessError from the disassembler.
    """
    kernel = compiled(case, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    wide = len(re.findall(r"\b(?:LDG|STG)\.E\.(?:\w+\.)*128\b", code))
    return AotReport(case.name, arch, registers, spills, wide, kernel.metadata.shared)
