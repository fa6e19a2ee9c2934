"""Files written whole or not at all, and the one error of a file system that refuses. Nothing else renames files.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast import exit_codes

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"  # in the folder of a run
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"  # its folder of checkpoints, and their names
WRITER = "checkpoints"  # name of the thread that writes them
ADVICE = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there",
    errno.EFBIG: "Raise the limit on a file's size",
    errno.EACCES: "Get the right to write there",
    errno.EPERM: "Get the right to write there",
    errno.EROFS: "Get the right to write there",
}


class StorageError(OSError):
    """A file or folder that could not be written: which, what the system said, what to do. Exit code 3."""

    exit_code = exit_codes.DATA

    def __init__(self, path: str | Path, error: Exception) -> None:
        self.path, number = Path(path), _number(error)
        self.reason = os.strerror(number) if number else str(error)
        todo = ADVICE.get(number or 0, "Check that path")
        super().__init__(f"{path} cannot be written: {self.reason}. {todo}, or write elsewhere (--out).")
        self.errno = number

    def __reduce__(self) -> tuple:
        told = (self.errno, self.reason) if self.errno else (self.reason,)
        return StorageError, (self.path, OSError(*told))  # from another process

    def add(self, advice: str) -> StorageError:
        """Adds a sentence to the message."""
        self.args = (f"{self} {advice}",)
        return self


def _number(error: Exception) -> int | None:
    """The system's number for what went wrong; safetensors has it in its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what the file system refuses within the block into a StorageError about `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(path, error) from error


def make_folder(path: str | Path) -> Path:
    """The folder, made with its parents where it is not there. Raises StorageError."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def read_text(path: str | Path) -> str:
    """The text of a file, with the names of files in it as this process writes them, whatever their encoding.

    A name that is no UTF-8, or any name beyond ASCII where the locale is C, has surrogates in Python; see PEP 383.
    """
    return os.fsdecode(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds a folder alone within the block; the system lets go of the lock however the process ends.

    Raises BlockingIOError where another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> int:
    """Writes `text` so that a reader sees the old file or the new one, never half of either. Returns its size in bytes.
    Raises StorageError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        return partial.stat().st_size


def append_text(path: str | Path, text: str) -> None:
    """Adds `text` at the end and closes the file, so that nothing is lost with the process. Raises StorageError."""
    make_folder(Path(path).parent)
    with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def check_writable(path: str | Path) -> None:
    """Before minutes of work: raises StorageError where its result could not be written to `path` afterwards.
    Leaves nothing behind."""
    new = not os.path.exists(path)
    made = [folder for folder in Path(path).parents if not folder.exists()]
    append_text(path, "")
    if new:
        os.unlink(path)
    for folder in made:
        with suppress(OSError):  # another process has put something there
            folder.rmdir()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Writes a .safetensors file whole or not at all, readable as the umask says. Returns its size in bytes.
    Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise StorageError(path, error) from error
        with suppress(PermissionError):  # a file system without modes
            partial.chmod(mode)  # safetensors makes a file that only its owner may read
        return partial.stat().st_size


def save_figure(path: str | Path, figure: Any, dpi: int) -> None:
    """Draws a matplotlib figure, into a .pdf as vectors, else into a .png, whole or not at all. Raises StorageError."""
    form = "pdf" if Path(path).suffix == ".pdf" else "png"
    with replacing(path) as partial:  # a .pdf without the date: equal figures are equal files
        figure.savefig(partial, dpi=dpi, format=form, metadata={"CreationDate": None} if form == "pdf" else None)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` for the block to write to; flushed to disk, it takes the place of `path` in one move.

    Where the block fails, the old file stays as it is and the new one is removed. Raises StorageError.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    make_folder(path.parent)
    try:
        with writing(path):
            yield partial
            _flush(partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Removes what killed processes had begun to write below `folder` (see `replacing`), and returns it.

    A file stays while the process that it names lives; one of this process's own number is from before a restart.
    Only where nobody else of this process is writing there.
    """
    gone = []
    for path in Path(folder).rglob(".*.partial"):
        owner = re.fullmatch(r"\..*\.(\d+)\.partial", path.name)
        if owner and path.is_file() and not _other_lives(int(owner[1])):
            with suppress(OSError):
                path.unlink()
                gone.append(path)
    return gone


def _other_lives(process: int) -> bool:
    """Whether a process of this number is there and is not this one."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _flush(path: Path) -> None:
    """Onto the disk: a rename that survives a power cut must not show a file whose bytes did not."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
