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

    A line of `stage` is shown in place on a terminal, and disappears before anything else is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost, self.staged = stream, None, False  # lost: the OSError that ended the stream
        self.peer: Output | None = None  # on the same terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        for each in (self, self.peer):
            if each is not None and each.staged:
                each.staged = False
                each._attempt(lambda each=each: each.stream.write("\r\x1b[2K"), flush=True)
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self.stream.isatty()
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
def unbreakable() -> Iterator[tuple[Output, Output]]:
    """Puts `Output` around standard output and error within the block.

    A closed descriptor is opened to nowhere first: the next file that is opened, a checkpoint, would get its number.
    """
    before = sys.stdout, sys.stderr
    _fill_standard_descriptors()
    outputs = tuple(Output(_lenient(stream)) for stream in before)
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
