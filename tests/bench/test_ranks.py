"""The formula of ranks: fits give back what made the times, documents say what it computes; and the SLURM script."""

from __future__ import annotations

import os
import runpy
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench import ranks

ROOT = Path(ranks.__file__).parents[1]


def test_fitted_gives_back_hop_and_bandwidth() -> None:
    times = [ranks.reduction(size, 2, 2e-4, 1 / 3e9, 2) for size in ranks.SIZES]
    hop, byte = ranks.fitted(ranks.SIZES, times, 2)
    assert (hop, 1 / byte) == (pytest.approx(2e-4), pytest.approx(3e9))


def test_reduction_is_nothing_for_one_rank_and_shares_cores() -> None:
    assert ranks.reduction(10**6, 1, 1e-4, 1e-9, 2) == 0
    assert ranks.reduction(10**6, 4, 1e-4, 1e-9, 2) == pytest.approx(2 * (6 * 1e-4 + 1.5e-3))
    assert ranks.reduction(10**6, 4, 1e-4, 1e-9, 4) == pytest.approx(6 * 1e-4 + 1.5e-3)


def test_documented_tables_are_what_the_formula_computes() -> None:
    computed = runpy.run_path(str(ROOT / "docs" / "ranks.py"))
    text = (ROOT / "docs" / "ranks.md").read_text()
    lines = [line for name in computed["PRESETS"] for line in computed["rows"](name)]
    lines += [computed["failures"](gpus) for gpus in (8, 64, 1000)]
    assert len(lines) == 11 and all(line in text for line in lines)


def test_documented_gradient_bytes_are_those_of_the_presets() -> None:
    from ris_fast import build_model, load_config
    from ris_fast.kernels.fused_step.layout import padded

    for name, preset in runpy.run_path(str(ROOT / "docs" / "ranks.py"))["PRESETS"].items():
        config = load_config(preset=name)
        model = build_model(config.model.name, config.task, **config.model.options)
        assert preset.gradient_bytes == 4 * sum(padded(p.numel()) for p in model.parameters() if p.requires_grad)
        assert (preset.batch, preset.scenes, preset.epochs) == (
            config.training.batch_size, config.data.train_scenes, config.training.epochs,
        )  # fmt: skip


class Ideal(ranks.Machine):
    """Measures what the formula says, at 1 ms a scene, 2 ms a step, 0.1 ms a hop and 2 GB/s; ranks train the same."""

    def run(self, kind: str, given: dict[str, Any], ranks_: int = 1) -> dict[str, Any]:
        def added(size: int) -> float:
            return ranks.reduction(size, ranks_, 1e-4, 1 / 2e9, 2)

        if kind == "all_reduce":
            return {"seconds": [added(size) for size in given["bytes"]]}
        if "weights" in given:
            save_file({"w": torch.full((4,), 1.0 + 1e-6 * (ranks_ == 4))}, given["weights"])
        crowd = 1.1 * max(1, ranks_ / 2) if ranks_ > 1 else 1.0
        step = crowd * (2e-3 + 1e-3 * given["batch"]) + (0.0 if given.get("lockstep") else added(10**7))
        return {"step_s": step, "bytes": 10**7, "tensors": 1}


def test_bench_predicts_what_an_ideal_machine_measures(tmp_path: Path) -> None:
    machine = Ideal(tmp_path)
    machine.cores = 2
    found: dict[str, Any] = {"all_reduce": ranks.all_reduces(machine), "seconds": 1.0}
    hop, byte = found["all_reduce"]["hop_s"], 1 / found["all_reduce"]["bytes_per_s"]
    found["steps"] = {"laptop": ranks.steps(machine, "laptop", 40, hop, byte)}
    found |= {"ranks_or_threads": ranks.ranks_or_threads(machine), "equality": ranks.equality(machine)}
    steps = found["steps"]["laptop"]
    assert (steps["fixed_s"], steps["per_scene_s"]) == (pytest.approx(2e-3), pytest.approx(1e-3))
    for row in (*steps["rows"], *found["all_reduce"]["rows"]):
        pairs = [(row[key], row[key.replace("formula", "measured")]) for key in row if key.startswith("formula")]
        assert pairs and all(formula == pytest.approx(measured) for formula, measured in pairs)
    apart = found["equality"]["relative_difference"]
    assert apart["2"] == 0 and apart["4"] == pytest.approx(1e-6, rel=0.1)
    text = ranks.printed(found)
    assert "4 ranks" in text and "(+0%)" in text and "2 ranks x 1 thread, 64 scenes a step" in text


@pytest.mark.parametrize("resumed", [False, True])
def test_slurm_script_starts_one_torchrun_a_node_and_continues_a_run(tmp_path: Path, resumed: bool) -> None:
    for name, body in (("srun", 'printf "%s\\n" "$OMP_NUM_THREADS" "$@"'), ("scontrol", 'printf "n7\\nn8\\n"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    run = tmp_path / "a run"
    if resumed:
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "last.safetensors").touch()
    slurm = {"JOB_ID": "5", "JOB_NODELIST": "n[7-8]", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_PER_TASK": "32"}
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run)}
    environ |= {f"SLURM_{name}": value for name, value in slurm.items()}
    environ.pop("OMP_NUM_THREADS", None)
    script = str(ROOT / "docs" / "slurm.sh")
    done = subprocess.run(["bash", script, "--set", "a=b c"], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "4", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d",
        "--rdzv-endpoint=n7:29400", "--rdzv-id=5.0", "--max-restarts=3", "-m", "ris_fast", "train",
        "--resume" if resumed else "--out", str(run), "--set", "a=b c",
    ]  # fmt: skip
