"""`python -m ris_fast` is `ris-fast`."""

from __future__ import annotations

import sys

from ris_fast.commands.cli import main

sys.exit(main())
