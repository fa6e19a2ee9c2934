"""A process that has imported everything and forks once a command: `python -m bench.durability.server`.

Reads one request a line from standard input, as JSON: arguments, folder to be in, file for the output, and optionally
`powerless` (root may then no more than its files' modes say) and `file_limit` (bytes a file may have). Answers with the
number of the new process, and with its status as `waitpid` gives it once it has ended. The command runs from the
outermost frame, so that Python ends in it as it does after `python -m ris_fast`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys

NEEDED = (
    "commands.cli commands.train commands.simulate commands.why health.monitor.attach report.console report.tensor_log"
    " training.trainer training.mfu models.hybrid models.linear physics.baselines environment"
)


def give_up_capabilities() -> None:
    """What root may beyond other users, such as to write where the mode says no. Others have nothing to give up."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process; none
    if ctypes.CDLL(None).capset(header, data) != 0:
        raise OSError("capset")


def become(request: dict) -> None:
    """Makes this new process what the request asks for."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a campaign in the background ignores
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    empty = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((empty, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, number)
    os.chdir(request["folder"])
    if limit := request.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if request.get("powerless"):
        give_up_capabilities()
    sys.argv = ["ris-fast", *request["arguments"]]


def serve() -> bool:
    """Answers requests; true in a new process that has a command to run, false at the end of the input."""
    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            become(request)
            return True
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)
    return False


if __name__ == "__main__":
    for name in NEEDED.split():
        importlib.import_module(f"ris_fast.{name}")
    print("ready", flush=True)
    if serve():
        from ris_fast.commands.cli import main

        sys.exit(main())
