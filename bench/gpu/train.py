"""One training as a user starts it, its rows kept whatever ends it: `python -m bench.gpu.train PRESET SECONDS [...]`.

What follows the seconds goes to `ris-fast train` as it is. Where the training fails, it runs again without compiling.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.rows import note
from ris_fast.exit_codes import DONE, INTERRUPTED, NOT_LEARNED
from ris_fast.files import METRICS, SUMMARY
from ris_fast.report.eventlog import read_events

TARGETS = (0.5, 0.35, 0.187, 0.03)


def main(preset: str, seconds: str, *options: str) -> int:
    common = ["--preset", preset, "--max-seconds", seconds, "--set", "report.plots=false", "--set", "health.stop=false"]
    code = train(preset, [*common, *options])
    if code not in (DONE, INTERRUPTED) and "training.compile=false" not in options:
        code = train(f"{preset}, uncompiled", [*common, *options, "--set", "training.compile=false"])
    return code


def train(item: str, options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        child = subprocess.Popen([sys.executable, "-m", "ris_fast", "train", "--out", str(run), *options])
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # the stage's end is the training's, which then saves its summary
            signal.signal(number, lambda *_: child.send_signal(signal.SIGINT))
        code = child.wait()
        found = curve(run)
        note(item, ok=found["summary"] is not None, exit_code=code, **found)
    return DONE if code == NOT_LEARNED else code  # it ran to its end; what it learned is in the row


def curve(run: Path) -> dict[str, Any]:
    """Summary, start and epochs of a run, and the seconds at which it was first at or below each target."""
    rows = read_events(run / METRICS, skip_broken=True) if (run / METRICS).is_file() else []
    epochs = [row for row in rows if row.get("event") == "epoch"]
    best = [
        (row["seconds"], min(row[key] for key in ("val_nmse_raw", "val_nmse_ema") if row.get(key) is not None))
        for row in epochs
    ]
    return {
        "summary": json.loads((run / SUMMARY).read_text()) if (run / SUMMARY).is_file() else None,
        "start": next((row for row in rows if row.get("event") == "start"), None),
        "epochs": epochs,
        "seconds_to": {str(target): next((at for at, score in best if score <= target), None) for target in TARGETS},
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
