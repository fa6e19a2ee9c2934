"""The exit codes of `ris-fast`, in one table. An exception whose `exit_code` is one of them is a message to the user.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

DONE = 0  # done
GRADIENT_WRONG = 1  # `ris-fast gradcheck`; also Python's own code for an uncaught exception, which never leaves `main`
USAGE = 2  # bad usage or configuration
DATA = 3  # a data problem, or a path that cannot be read or written
NOT_LEARNED = 4  # stopped by health, a certain mistake in `ris-fast check`, or ended without having learned
OUT_OF_MEMORY = 5  # more memory was needed than there is
BUG = 70  # an error of ours: EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # Ctrl-C, SIGTERM or SIGHUP
