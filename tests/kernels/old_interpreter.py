"""Triton's interpreter of 3.6, which numpy 2.4 and later break; the kernels themselves do not mind."""

from __future__ import annotations

import pytest

from ris_fast.gradcheck import BY_NUMPY


def skip_interpreter_of_old_triton(said: str) -> None:
    """Skips the test if that is what an interpreting process ended with."""
    if BY_NUMPY in said:
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
