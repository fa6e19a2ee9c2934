"""Standard output and error that a run outlives: a reader that goes away, a full disk or a closed descriptor ends no
command.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

READER_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ESHUTDOWN)  # EIO: the terminal was closed


class Output:
    """A text stream whose writes never raise. After the first one that fails it is silent, and `lost` says why.

    A line of `stage` is shown in place on a terminal, and disappears before anything else is written. With a `prefix`,
    which each line begins with, it is no terminal's.
    """

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self.stream, self.lost, self.staged = stream, None, False  # lost: the OSError that ended the stream
        self.prefix, self.within_line = prefix, False
        self.peer: Output | None = None  # on the same terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        for each in (self, self.peer):
            if each is not None and each.staged:
                each.staged = False
                each._attempt(lambda each=each: each.stream.write("\r\x1b[2K"), flush=True)
        self._attempt(lambda: self.stream.write(self._prefixed(text)))
        return len(text)

    def _prefixed(self, text: str) -> str:
        if not self.prefix or not text:
            return text
        begun, self.within_line = self.within_line, not text.endswith("\n")
        lines = "".join(self.prefix + line for line in text.splitlines(keepends=True))
        return lines.removeprefix(self.prefix) if begun else lines

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return not self.prefix and self.stream.isatty()
        return False

    def stage(self, text: str) -> None:
        """Says on a terminal what a command is busy with; silent in a file."""
        if self.isatty() and os.environ.get("TERM") != "dumb":
            self._attempt(lambda: self.stream.write(f"\r\x1b[2K{text} ..."), flush=True)
            self.staged = True

    def _attempt(self, write: Any, *, flush: bool = False) -> None:
        if self.lost is not None:
            return
        try:
            write()
            if flush:
                self.stream.flush()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self.stream.closed:
                raise
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Sends what the buffer still holds, and what others write to the descriptor, to nowhere."""
        self.lost = error
        with suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            if descriptor in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    @property
    def failed(self) -> bool:
        """Whether output was lost that somebody still wanted: a full disk, and not a reader that has seen enough."""
        return isinstance(self.lost, OSError) and self.lost.errno not in READER_LEFT


def stage(text: str) -> None:
    """Says on a command's terminal what it is busy with, until the next line; nothing where no command runs."""
    if isinstance(sys.stderr, Output):
        sys.stderr.stage(text)


@contextmanager
def unbreakable(rank: int = 0) -> Iterator[tuple[Output, Output]]:
    """Puts `Output` around standard output and error within the block; of ranks but the first, nothing is put out, and
    errors begin with their number.

    A closed descriptor is opened to nowhere first: the next file that is opened, a checkpoint, would get its number.
    """
    before = sys.stdout, sys.stderr
    _fill_standard_descriptors()
    streams = before if rank == 0 else (None, before[1])
    outputs = tuple(Output(_lenient(stream), f"rank {rank}: " if rank else "") for stream in streams)
    outputs[0].peer, outputs[1].peer = outputs[1], outputs[0]
    sys.stdout, sys.stderr = outputs
    try:
        yield outputs
    finally:
        for output in outputs:
            output.flush()
        sys.stdout, sys.stderr = (
            stream if stream is not None else output.stream for stream, output in zip(before, outputs)
        )
        if rank:
            outputs[0].stream.close()


def _fill_standard_descriptors() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _lenient(stream: TextIO | None) -> TextIO:
    """A stream that takes every text: a file's name may be text in no encoding, and is escaped."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream
