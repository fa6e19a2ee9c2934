"""The Triton bodies under Triton's interpreter, as JSON: `TRITON_INTERPRET=1 python -m ris_fast.gradcheck`."""

from __future__ import annotations

import json
from dataclasses import asdict

from ris_fast.gradcheck.rows import triton_rows

if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in triton_rows()]))
