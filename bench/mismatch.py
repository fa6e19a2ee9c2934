"""Networks beyond the standard task, and on scenes that they were not trained on: `python -m bench.mismatch`.

Trains what is missing under --runs, four runs of 240 s, and prints a mismatch report for each kind of change: an array
that is not as its calibration says, the exact wavefront, symbols of every snapshot. A run that is there already, or a
link to one, is taken as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ris_fast.commands.cli import main as ris_fast

TRAINED = {
    "standard": (),
    "miscalibrated": ("task.phase_error_deg=10", "task.channel_snr_db=25"),
    "spherical": ("task.wavefront=spherical",),
    "per_snapshot": ("task.symbols=per_snapshot",),
}
REPORTS = {
    "miscalibrated": ("task.phase_error_deg=5,10,20", "task.channel_snr_db=20,30"),
    "spherical": (),
    "per_snapshot": (),
}


def main() -> int:
    """Exit code 0, or that of the first training or report that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mismatch"), help="folder of the runs and reports")
    parser.add_argument("--scenes", default="8000", help="test scenes of each task")
    given = parser.parse_args()
    for name, settings in TRAINED.items():
        words = [word for setting in settings for word in ("--set", setting)]
        if not (given.runs / name / "summary.json").exists():
            if code := ris_fast(["train", "--preset", "laptop", *words, "--out", str(given.runs / name)]):
                return code
    for name, changes in REPORTS.items():
        print(f"\n== {name}", flush=True)
        words = [word for change in changes for word in ("--against", change)]
        runs, out = [str(given.runs / each) for each in ("standard", name)], given.runs / "reports" / name
        if code := ris_fast(["mismatch", *runs, *words, "--scenes", given.scenes, "--out", str(out)]):
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
