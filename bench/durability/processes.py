"""Commands in processes of their own: started, watched, killed, and what they said."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
PATIENCE = 120.0  # seconds after which a command counts as hanging


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code`: its exit code, or minus the signal that killed it."""

    code: int
    seconds: float
    text: str

    @property
    def trained(self) -> bool:
        """The end of a run, whether or not so few steps taught it anything."""
        return self.code in (0, 4)

    @property
    def last_line(self) -> str:
        return (self.text.strip().splitlines() or [""])[-1]


class Server:
    """Starts commands by `server.py`, one at a time. Args: environment: variables that it has besides the usual."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.durability.server"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read = b""
        assert self._line(PATIENCE) == "ready"
        self.pid, self.log, self.began = 0, Path(os.devnull), 0.0
        self.ended: Ended | None = None  # of the last command

    def start(self, arguments: Sequence[str], folder: Path, name: str = "log", **limits: Any) -> None:
        """Starts a command in `folder`; its output goes to the file `name` there."""
        self.log = folder / name
        request = {"arguments": list(arguments), "folder": str(folder), "log": str(self.log), **limits}
        self.process.stdin.write((json.dumps(request) + "\n").encode())
        self.process.stdin.flush()
        self.pid, self.began, self.ended = int(self._line(PATIENCE)), time.monotonic(), None

    def end(self) -> Ended:
        """Waits for the end of the command. Raises: RuntimeError for one that hangs, and kills it."""
        if (ended := self.wait(PATIENCE)) is None:
            self.kill()
            raise RuntimeError(f"a command still runs after {PATIENCE:g} s: {self.log}")
        return ended

    def wait(self, seconds: float) -> Ended | None:
        """How the command ended; None where it has not within these seconds."""
        if self.ended is None and (line := self._line(seconds)) is not None:
            text = self.log.read_text(errors="replace")
            self.ended = Ended(os.waitstatus_to_exitcode(int(line)), time.monotonic() - self.began, text)
        return self.ended

    def run(self, arguments: Sequence[str], folder: Path, name: str = "log", **limits: Any) -> Ended:
        """Starts a command and waits for its end. Raises: RuntimeError."""
        self.start(arguments, folder, name, **limits)
        return self.end()

    def kill(self, number: int = signal.SIGKILL) -> Ended:
        """Sends the signal and waits; where the command has ended by now, how it did. Raises: RuntimeError."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
        if (ended := self.wait(PATIENCE)) is None:
            raise RuntimeError(f"a process goes on after signal {number}")
        return ended

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _line(self, seconds: float) -> str | None:
        until = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            got = os.read(self.process.stdout.fileno(), 4096)
            if not got:
                raise RuntimeError("the server of the campaign has ended")
            self._read += got
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()
