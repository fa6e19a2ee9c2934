"""Files are whole or as they were before; a file system that refuses is told in one sentence, whatever the library."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from ris_fast.files import StorageError, append_text, make_folder, save_figure, save_tensors, write_text

NUMBERS = {"numbers": torch.zeros(100_000)}


@pytest.fixture()
def nearly_full() -> Iterator[None]:
    """No file may grow beyond 100 kB: the same path through the libraries as a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def write_numbers(path: Path) -> None:
    save_tensors(path, NUMBERS)


def write_digits(path: Path) -> None:
    write_text(path, "0" * 400_000)


def append_digits(path: Path) -> None:
    append_text(path, "0" * 400_000)


def draw_noise(path: Path) -> None:
    figure = Figure(figsize=(6.0, 6.0))
    figure.figimage(np.random.default_rng(0).random((600, 600)))
    save_figure(path, figure, 100)


@pytest.mark.parametrize("write", [write_digits, write_numbers, draw_noise])
def test_writers_keep_the_old_file_on_a_full_disk(
    write: Callable[[Path], None], tmp_path: Path, nearly_full: None
) -> None:
    (tmp_path / "old").write_text("old")
    with pytest.raises(StorageError, match="Raise the limit on a file's size") as caught:
        write(tmp_path / "old")
    assert os.strerror(errno.EFBIG) in str(caught.value) and caught.value.errno == errno.EFBIG
    assert (tmp_path / "old").read_text() == "old" and os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize("write", [write_digits, write_numbers, append_digits])
@pytest.mark.parametrize(
    "number, todo",
    [
        (errno.ENOSPC, "Free space there"),
        (errno.EROFS, "the right to write"),
        (errno.EACCES, "the right to write"),
        (errno.EIO, "Check that path"),
    ],
)
def test_storage_error_says_which_file_why_and_what_to_do(
    write: Callable[[Path], None], number: int, todo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ris_fast.files.open" if write is append_digits else "os.fsync", refuse, raising=False)
    with pytest.raises(StorageError) as caught:
        write(tmp_path / "file")
    text = str(caught.value)
    assert str(tmp_path / "file") in text and os.strerror(number) in text and todo in text and "--out" in text
    assert caught.value.exit_code == 3 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_digits, write_numbers, append_digits, make_folder])
@pytest.mark.parametrize("place", ["/proc/no/such", "file/below"])
def test_storage_error_names_a_place_that_cannot_be_made(
    write: Callable[[Path], None], place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=Path(place).parent.name):
        write(tmp_path / place)


def test_writers_flush_before_they_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (order.append("flush"), flush(file)))
    monkeypatch.setattr("os.replace", lambda old, new: (order.append("rename"), rename(old, new)))
    write_text(tmp_path / "a", "a")
    write_numbers(tmp_path / "b")
    assert order == ["flush", "rename"] * 2


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_writers_respect_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "a")
        write_numbers(tmp_path / "tensors")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [mode, mode]


def test_save_tensors_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_tensors(tmp_path / "new" / "file", {"a": torch.arange(3)}, {"note": "x"})
    assert load_file(tmp_path / "new" / "file")["a"].tolist() == [0, 1, 2]
    with safe_open(tmp_path / "new" / "file", framework="pt") as file:
        assert file.metadata() == {"note": "x"}


def test_write_text_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "a")
    assert os.listdir(tmp_path) == []
