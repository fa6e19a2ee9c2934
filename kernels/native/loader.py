"""Finds the C++ library, chooses the instruction set, and hands out C functions to the operators.

RIS_FAST_SIMD = baseline | avx2 | avx512 overrides the choice (tests run every level that the machine has).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  loads the OpenMP library whose symbols ours resolves to

LEVELS = ("baseline", "avx2", "avx512")
PATH = Path(__file__).with_name("libris_fast.so")
SOURCES = Path(__file__).parents[1]  # of the kernels; a wheel has none of them


class SimdError(ValueError):
    """RIS_FAST_SIMD names no instruction set that is here; a usage error with exit code 2."""

    exit_code = 2


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    if not PATH.exists():
        return None, f"{PATH.name} was not built (installed with RIS_FAST_NO_NATIVE=1, or the install step was skipped)"
    try:
        library = ctypes.CDLL(str(PATH))
        library.ris_simd_level()
        library.ris_threads()
        library.ris_source_hash.restype = ctypes.c_char_p
        built_from = library.ris_source_hash().decode()
    except OSError as error:
        return None, f"{PATH.name} does not load: {error}"
    except AttributeError as error:
        return None, f"{PATH.name} loads, but is not the library of this version: {error}"
    if source_hash() not in ("", built_from):
        return None, f"{PATH.name} was built from other C++ sources than those beside it; run pip install again"
    return library, ""


def source_hash() -> str:
    """SHA-256 of the C++ sources, as CMakeLists.txt computes it; empty where they are not installed."""
    names = sorted(path.relative_to(SOURCES).as_posix() for end in ("cpp", "hpp") for path in SOURCES.rglob(f"*.{end}"))
    hashes = "".join(hashlib.sha256((SOURCES / name).read_bytes()).hexdigest() for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest() if names else ""


def available() -> bool:
    """True if the C++ kernels can be called on this machine."""
    return _open()[0] is not None


def why_not() -> str:
    """Reason why the C++ kernels cannot be called; empty if they can."""
    return _open()[1]


def supported_levels() -> tuple[str, ...]:
    """Instruction sets that both this processor and this library have, weakest first."""
    library = _open()[0]
    if library is None:
        return ()
    return LEVELS[: library.ris_simd_level() + 1]


@cache
def level() -> str:
    """Instruction set in use: the strongest supported, or RIS_FAST_SIMD."""
    supported = supported_levels()
    wanted = os.environ.get("RIS_FAST_SIMD", "")
    if not wanted:
        return supported[-1] if supported else "none"
    if wanted not in supported:
        raise SimdError(
            f"RIS_FAST_SIMD is {wanted!r}, but this machine ({platform.machine()}) has"
            f" {', '.join(supported) or 'no C++ kernels'}. Unset it or name what is there."
        )
    return wanted


def function(name: str, argtypes: list[Any], simd: str | None = None, restype: Any = None) -> Any:
    """The C function `name` of the instruction set in use (or of `simd`), ready to call.

    Args:
        name: name given to RIS_EXPORT in native.cpp.
        argtypes: ctypes of the arguments; pass tensors as `tensor.data_ptr()` with ctypes.c_void_p.
    Raises:
        RuntimeError: the library is missing; says why.
    """
    library = _open()[0]
    if library is None:
        raise RuntimeError(f"{name}: no C++ kernels here: {why_not()}. Reinstall ris-fast with a C++ compiler on PATH.")
    found = getattr(library, f"{name}_{simd or level()}", None)
    if found is None:
        raise RuntimeError(
            f"{name}: {PATH.name} has no such function; it was built from another version. Reinstall ris-fast."
        )
    found.argtypes, found.restype = argtypes, restype
    return found


def describe() -> str:
    """One line for `ris-fast env`."""
    if not available():
        return f"plain torch ({why_not()})"
    return f"C++ {level()}, {_open()[0].ris_threads()} threads (levels: {', '.join(supported_levels())})"
