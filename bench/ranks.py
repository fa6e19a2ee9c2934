"""Training on several ranks, measured with gloo on this machine's processor: `python -m bench.ranks`.

Measures how long an all-reduce takes, what a step of 1, 2 and 4 ranks takes, whether 1, 2 and 4 ranks train the same
weights, and how far the formula of docs/ranks.md is from what was measured. Writes bench/results/ranks.json.

The formula, for N ranks of one thread on C cores, B scenes a rank and S bytes of gradients:

    t(N) = u(N) (o + k B) + r(N),      r(N) = max(1, N / C) (2 (N - 1) a + 2 (1 - 1 / N) S / b)

o and k are of a rank alone, from two batch sizes. u(N) = u max(1, N / C), where u is how much longer a step of two
ranks takes that only meet where they would sum: they share caches and memory, which both want at the same moments, and
wait for the slower one. a and b are fitted to all-reduces of two ranks; those of four, and every step of several ranks
that sum, are predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ris_fast.environment import environment

RESULTS = Path(__file__).parent / "results" / "ranks.json"
SIZES = [4 * 4**power for power in range(5, 13)]  # bytes, 4 KB to 64 MB
SMALL, LARGE = 32, 128  # scenes a rank; the formula's o and k come from these two
STEPS = 40
NETWORKS = {"laptop": STEPS, "original": 24}  # preset -> steps; of `original` the all-reduce is a large part
EQUAL = {"preset": "laptop", "steps": 50, "epochs": 2, "accumulate": 2, "ragged": 19}  # ragged: 16 scenes and 3


class Machine:
    """Starts workers and gathers what they found; `cores` of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cores, self.started = folder, len(os.sched_getaffinity(0)), 0

    def run(self, kind: str, given: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
        """One measurement."""
        self.started += 1
        out = self.folder / f"{self.started}.json"
        words = ["-m", "bench.ranks_worker", kind, json.dumps(given | {"ranks": ranks}), str(out)]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environ = os.environ | {"OMP_NUM_THREADS": str(given.get("threads", 1)), "OMP_WAIT_POLICY": "passive"}
        if subprocess.run([sys.executable, *launch, *words], env=environ).returncode:
            raise SystemExit(f"bench.ranks: a worker of {kind} {given} failed; its error is above.")
        return json.loads(out.read_text())


def fitted(sizes: Sequence[int], seconds: Sequence[float], ranks: int) -> tuple[float, float]:
    """(a, 1 / b) of r(N) by least squares of relative errors: seconds a hop, and a byte."""
    rows = [(2 * (ranks - 1) / t, 2 * (1 - 1 / ranks) * size / t) for size, t in zip(sizes, seconds)]
    pp, pq, qq = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    p, q = (sum(row[i] for row in rows) for i in (0, 1))
    scale = pp * qq - pq * pq
    return (p * qq - q * pq) / scale, (q * pp - p * pq) / scale


def reduction(size: int, ranks: int, hop: float, byte: float, cores: int) -> float:
    """r(N) in seconds; 0 for one rank."""
    crowd = max(1.0, ranks / cores)
    return crowd * (2 * (ranks - 1) * hop + 2 * (1 - 1 / ranks) * size * byte)


def all_reduces(machine: Machine) -> dict[str, Any]:
    """Times by bytes for 2 and 4 ranks, the fit to those of 2, and what it predicts for 4."""
    found = {ranks: machine.run("all_reduce", {"bytes": SIZES}, ranks) for ranks in (2, 4)}
    hop, byte = fitted(SIZES, found[2]["seconds"], 2)
    rows = [
        {
            "bytes": size,
            **{f"measured_{ranks}": found[ranks]["seconds"][at] for ranks in (2, 4)},
            **{f"formula_{ranks}": reduction(size, ranks, hop, byte, machine.cores) for ranks in (2, 4)},
        }
        for at, size in enumerate(SIZES)
    ]
    return {"hop_s": hop, "bytes_per_s": 1 / byte, "rows": rows}


def steps(machine: Machine, preset: str, count: int, hop: float, byte: float) -> dict[str, Any]:
    """Steps of 1, 2 and 4 ranks of `SMALL` scenes, measured and by the formula; 1 and 2 twice, alternating."""
    given = {"preset": preset, "steps": count, "batch": SMALL}
    large = machine.run("train", given | {"batch": LARGE})
    alone, pair, meeting = [], [], []
    for _ in range(2):
        alone.append(machine.run("train", given))
        meeting.append(machine.run("train", given | {"lockstep": True}, 2))
        pair.append(machine.run("train", given, 2))
    four = machine.run("train", given, 4)
    one, two, slowed = (statistics.median(each["step_s"] for each in found) for found in (alone, pair, meeting))
    per_scene = (large["step_s"] - one) / (LARGE - SMALL)
    share = slowed / one / max(1.0, 2 / machine.cores)
    rows = []
    for ranks, measured in ((1, one), (2, two), (4, four["step_s"])):
        crowd = 1.0 if ranks == 1 else share * max(1.0, ranks / machine.cores)
        added = reduction(alone[0]["bytes"], ranks, hop, byte, machine.cores)
        predicted = crowd * one + added
        rows.append(
            {
                "ranks": ranks, "measured_s": measured, "formula_s": predicted, "all_reduce_s": added,
                "scenes_per_s": ranks * SMALL / measured, "efficiency": one / measured,
            }
        )  # fmt: skip
    return {
        "bytes": alone[0]["bytes"], "tensors": alone[0]["tensors"], "fixed_s": one - per_scene * SMALL,
        "per_scene_s": per_scene, "two_in_lockstep": slowed / one, "scenes_a_rank": SMALL, "rows": rows,
    }  # fmt: skip


def ranks_or_threads(machine: Machine) -> dict[str, Any]:
    """2 ranks of one thread against 1 rank of two threads, the same step of 2 * SMALL and 2 * LARGE scenes."""
    found = {}
    for batch in (SMALL, LARGE):
        ranks, threads = [], []
        for _ in range(2):
            given = {"preset": "laptop", "steps": STEPS}
            ranks.append(machine.run("train", given | {"batch": batch}, 2)["step_s"])
            threads.append(machine.run("train", given | {"batch": 2 * batch, "threads": 2})["step_s"])
        two, one = (2 * batch / statistics.median(each) for each in (ranks, threads))
        found[str(2 * batch)] = {
            "two_ranks_scenes_per_s": two, "two_threads_scenes_per_s": one, "ratio": two / one,
            "step_s": {"two_ranks": ranks, "two_threads": threads},
        }  # fmt: skip
    return found


def equality(machine: Machine) -> dict[str, Any]:
    """How far weights of 2 and 4 ranks are from those of one, after the same 50 steps of 32 scenes."""
    weights = {}
    for ranks in (1, 2, 4):
        file = machine.folder / f"weights{ranks}.safetensors"
        machine.run("train", EQUAL | {"batch": 16 // ranks, "weights": str(file)}, ranks)
        weights[ranks] = load_file(file)
    size = math.sqrt(sum(float(value.double().square().sum()) for value in weights[1].values()))
    return {
        "steps": EQUAL["steps"],
        "relative_difference": {
            str(ranks): math.sqrt(
                sum(
                    float((weights[ranks][name].double() - value.double()).square().sum())
                    for name, value in weights[1].items()
                )
            )
            / size
            for ranks in (2, 4)
        },
    }


def printed(found: dict[str, Any]) -> str:
    """The results as a table."""
    fit = found["all_reduce"]
    lines = [f"all-reduce: {fit['hop_s'] * 1e6:.0f} us a hop, {fit['bytes_per_s'] / 1e9:.2f} GB/s (fit to 2 ranks)"]
    lines.append("  bytes        2 ranks ms (formula)     4 ranks ms (formula)")
    for row in fit["rows"]:
        pairs = [(row[f"measured_{ranks}"] * 1e3, row[f"formula_{ranks}"] * 1e3) for ranks in (2, 4)]
        lines.append(f"  {row['bytes']:>10,}" + "".join(f"{ms:>14.3f} ({by:.3f})" for ms, by in pairs))
    for preset, each in found["steps"].items():
        lines.append(
            f"{preset}, {each['bytes'] / 1e6:.1f} MB of gradients, {each['scenes_a_rank']} scenes a rank; two ranks"
            f" in lockstep that sum nothing take {each['two_in_lockstep']:.2f} times as long as one"
        )
        lines += [
            f"  {row['ranks']} ranks: {row['measured_s'] * 1e3:7.1f} ms a step, formula {row['formula_s'] * 1e3:7.1f}"
            f" ({row['formula_s'] / row['measured_s'] - 1:+.0%}), all-reduce {row['all_reduce_s'] * 1e3:.1f} ms,"
            f" {row['scenes_per_s']:.0f} scenes/s"
            for row in each["rows"]
        ]
    lines += [
        f"2 ranks x 1 thread, {scenes} scenes a step: {each['two_ranks_scenes_per_s']:.0f} scenes/s; 1 rank x 2"
        f" threads: {each['two_threads_scenes_per_s']:.0f}; ratio {each['ratio']:.2f}"
        for scenes, each in found["ranks_or_threads"].items()
    ]
    apart = found["equality"]["relative_difference"]
    lines.append(
        f"weights after 50 steps, from those of one rank: {apart['2']:.1e} for 2 ranks, {apart['4']:.1e} for 4"
    )
    return "\n".join([*lines, f"took {found['seconds']:.0f} s"])


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    out, began = parser.parse_args().out, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        found: dict[str, Any] = {"env": environment() | {"platform": _platform()}, "all_reduce": all_reduces(machine)}
        hop, byte = found["all_reduce"]["hop_s"], 1 / found["all_reduce"]["bytes_per_s"]
        found["steps"] = {preset: steps(machine, preset, count, hop, byte) for preset, count in NETWORKS.items()}
        found |= {"ranks_or_threads": ranks_or_threads(machine), "equality": equality(machine)}
    found["seconds"] = time.monotonic() - began
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(printed(found))
    return 0


def _platform() -> str:
    """System, processor and C library, without what names the machine or its kernel."""
    import platform

    return f"{platform.system()}-{platform.machine()}-with-{''.join(platform.libc_ver())}"


if __name__ == "__main__":
    raise SystemExit(main())
