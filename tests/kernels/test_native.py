"""The C++ library: instruction sets, the override, the message where it is missing, no thread pool of its own."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ris_fast.kernels.native import loader

needs_library = pytest.mark.skipif(not loader.available(), reason=f"no C++ kernels: {loader.why_not()}")
SHOW = "from ris_fast.kernels.native import loader; print(loader.level(), loader._open()[0].ris_threads())"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


@needs_library
def test_loader_chooses_the_best_simd_level() -> None:
    levels = loader.supported_levels()
    assert levels[0] == "baseline" and levels == loader.LEVELS[: len(levels)]
    assert run(SHOW, RIS_FAST_SIMD="").stdout.split()[0] == levels[-1]


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("level", loader.supported_levels())
def test_loader_obeys_the_simd_override(level: str) -> None:
    assert run(SHOW, RIS_FAST_SIMD=level).stdout.split()[0] == level


@pytest.mark.slow
@needs_library
def test_loader_names_the_levels_for_an_unknown_override() -> None:
    done = run(SHOW, RIS_FAST_SIMD="avx1024")
    assert done.returncode != 0 and "avx1024" in done.stderr and "baseline" in done.stderr


@needs_library
def test_native_kernels_use_torchs_threads() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert loader._open()[0].ris_threads() == count
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="wheels are for Linux on x86-64")
def test_library_asks_for_no_more_than_its_wheel_promises() -> None:
    """The names of the versions that a library needs stand in it as text; auditwheel reads the same in `.ci/wheel`."""
    root, library = Path(__file__).parents[2], loader.PATH.read_bytes()
    project = tomllib.loads((root / "pyproject.toml").read_text())
    policy = project["tool"]["cibuildwheel"]["manylinux-x86_64-image"]
    assert f"--plat {policy}_x86_64" in (root / ".ci" / "wheel").read_text()
    promised = tuple(map(int, policy.removeprefix("manylinux_").split("_")))
    needed = {tuple(map(int, each)) for each in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    assert needed and max(needed) <= promised
    assert not re.findall(rb"libstdc\+\+|libgomp|GLIBCXX|CXXABI|libgcc_s", library)


@needs_library
def test_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    """A call into it would read arguments that are not there, and answer with numbers that mean nothing."""
    (tmp_path / "sum.cpp").write_text("int sum(int a, int b) { return a + b; }\n")
    code = (
        "from pathlib import Path; from ris_fast.kernels.native import loader; "
        f"loader.SOURCES = Path({str(tmp_path)!r}); print(loader.available(), loader.why_not())"
    )
    done = run(code)
    assert done.stdout.startswith("False libris_fast.so was built from other C++ sources"), done.stderr
    assert run(code.replace(str(tmp_path), str(tmp_path / "none"))).stdout.split() == ["True"]


def test_native_library_links_no_openmp_of_its_own() -> None:
    assert b"libgomp.so" not in loader.PATH.read_bytes() and b"libomp.so" not in loader.PATH.read_bytes()


@needs_library
def test_loader_function_refuses_a_missing_one() -> None:
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        loader.function("no_such_kernel", [ctypes.c_void_p])


@pytest.mark.slow
def test_operators_work_without_the_native_library(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from ris_fast.kernels.native import loader; loader.PATH = Path('nowhere.so'); "
        "import torch, ris_fast; f = torch.randn(2, 16, 3, 2, requires_grad=True); "
        "ris_fast.cov_nmse(f, target_factor=torch.randn(2, 16, 2, 2)).backward(); "
        "assert f.grad.abs().sum() > 0 and not loader.available(); print(loader.describe())"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "plain torch" in done.stdout and "was not built" in done.stdout


def test_setup_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = (
        "import runpy, setuptools; setuptools.setup = lambda **k: None;"
        f" runpy.run_path({str(root / 'setup.py')!r})['find_compiler']()"
    )
    done = run(code, PATH=str(tmp_path), CXX="")
    assert done.returncode != 0
    assert "build-essential" in done.stderr and "RIS_FAST_NO_NATIVE=1" in done.stderr
