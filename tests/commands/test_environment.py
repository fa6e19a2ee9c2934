"""A machine without this version's C++ kernels is told so, in one line and with the reason."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ris_fast.commands.cli import main
from ris_fast.environment import fallback_note
from ris_fast.kernels.native import loader


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the loader looks for its library during the test."""
    path = tmp_path / "libris_fast.so"
    monkeypatch.setattr(loader, "PATH", path)
    _forget()
    yield path
    _forget()


def _forget() -> None:
    loader._open.cache_clear()
    loader.level.cache_clear()


def test_fallback_note_is_none_with_the_library() -> None:
    assert (fallback_note() is None) == loader.available()


def test_fallback_note_names_a_missing_library(library: Path) -> None:
    note = fallback_note()
    assert "libris_fast.so was not built" in note and "C++ compiler" in note and "\n" not in note


def test_fallback_note_names_a_library_that_does_not_load(library: Path, capsys: pytest.CaptureFixture) -> None:
    library.write_bytes(b"not a library")
    assert "libris_fast.so does not load" in fallback_note()
    assert main(["env"]) == 0
    assert "plain torch: libris_fast.so does not load" in capsys.readouterr().out


def test_fallback_note_names_a_library_of_another_version(library: Path) -> None:
    source = library.with_suffix(".c")
    source.write_text("int ris_simd_level(void) { return 0; }\n")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    assert "is not the library of this version" in fallback_note() and "ris_threads" in fallback_note()


@pytest.mark.skipif(not loader.available(), reason=loader.why_not() or "built")
def test_loader_function_names_what_the_library_lacks() -> None:
    with pytest.raises(
        RuntimeError, match="no_such_kernel: libris_fast.so has no such function; it was built from another version"
    ):
        loader.function("no_such_kernel", [])


def test_env_refuses_an_unknown_simd_level(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RIS_FAST_SIMD", "avx3")
    loader.level.cache_clear()
    try:
        assert main(["env"]) == (2 if loader.available() else 0)
    finally:
        loader.level.cache_clear()
    if loader.available():
        assert "RIS_FAST_SIMD is 'avx3'" in (said := capsys.readouterr().err) and "baseline" in said
