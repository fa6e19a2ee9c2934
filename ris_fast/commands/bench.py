"""`ris-fast bench`: a short run of the benchmarks on this machine, as tables and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ris_fast import exit_codes
from ris_fast.benchmarks import device as counted
from ris_fast.benchmarks import training
from ris_fast.benchmarks.kernels import compare_kernels
from ris_fast.benchmarks.train_step import compare_steps
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.files import check_writable
from ris_fast.report.eventlog import write_json
from ris_fast.report.tables import text_table
from ris_fast.streams import stage
from ris_fast.timing import conditions, keeping
from ris_fast.training.compiled_model import choose_device

KINDS = ("kernels", "step", "train")
SIZES = {"cpu": (64, 256, 1024), "cuda": (64, 256, 1024, 4096, 16384)}
STEP_BATCH = 64


def bench_command(what: str | None, *, device: str, json: Path | None) -> int:
    """Measures, prints the tables, and writes the figures to `json`. Returns: 130 where it was interrupted, else 0."""
    chosen = choose_device(device, "--device")
    if json is not None:
        check_writable(json)
    result = run_bench(
        (what,) if what else KINDS,
        chosen,
        lambda kind: print(f"measuring: {kind}, minutes", file=sys.stderr, flush=True),
    )
    print(bench_text(result))
    if json is not None:
        write_json(json, result)
    return exit_codes.INTERRUPTED if "stopped" in result else exit_codes.DONE


def run_bench(
    kinds: tuple[str, ...], device: torch.device, progress: Callable[[str], None] = lambda kind: None
) -> dict[str, Any]:
    """What was asked for, by kind, with the conditions under which it was measured. `progress` is called with each kind
    first.

    Ctrl-C ends it: what had been measured is returned, and `stopped` names the kind that is not whole.
    """
    measured: dict[str, Callable[[torch.device], Any]] = {
        "kernels": compare_kernels,
        "step": bench_step,
        "train": bench_train,
    }
    result: dict[str, Any] = {"conditions": conditions(device)}
    for kind in kinds:
        progress(kind)
        try:
            result[kind] = measured[kind](device)
        except KeyboardInterrupt as interrupt:
            return result | {"stopped": kind} | ({kind: found} if (found := getattr(interrupt, "found", None)) else {})
    return result


def configured(preset: str, device: torch.device) -> Config:
    config = load_config(preset=preset)
    return replace(config, training=replace(config.training, device=str(device)))


def bench_step(device: torch.device) -> dict[str, Any]:
    """Preset `original`: ours against the peers."""
    return compare_steps(configured("original", device), STEP_BATCH)


def bench_train(device: torch.device) -> dict[str, Any]:
    """The device's default preset: rate by batch size, time by phase, MFU, launches, energy."""
    config = configured("full" if device.type == "cuda" else "laptop", device)
    found: dict[str, Any] = {"preset": config.preset, "model": config.model.name, "by_batch": []}
    with keeping(lambda: found):
        for size in SIZES[device.type]:
            rows = training.by_batch(config, (size,), 2**14 if device.type == "cuda" else 2**12, compile=False)
            found["by_batch"] += rows
            if not rows[-1]["scenes_per_s"]:
                break
        best = max((row for row in found["by_batch"] if row["scenes_per_s"]), key=lambda row: row["scenes_per_s"])[
            "batch_size"
        ]
        stage(f"timing the phases of a step, batch {best:,}")
        found["phases"] = training.phases(config, best)
        found["efficiency"] = training.efficiency(config, best)
        call, trainer = training.step_call(config, best)
        found["counts"] = counted.launches_and_waits(call, trainer.device)
        found["energy"] = counted.energy(call, trainer.device, best)
    return found


# ---- tables -------------------------------------------------------------------------------------------------------


def bench_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    shown = {"kernels": _kernels_text, "step": _step_text, "train": _train_text}
    where = result["conditions"]
    parts = [
        f"commit {where['commit']}, torch {where['versions']['torch']}, {where['device']}, {where['threads']} threads"
    ]
    end = (
        [f"stopped while measuring {result['stopped']}: the figures above were measured before"]
        if "stopped" in result
        else []
    )
    return "\n\n".join(parts + [show(result[kind]) for kind, show in shown.items() if kind in result] + end)


def _kernels_text(rows: list[dict[str, Any]]) -> str:
    lines = [
        (
            row["operator"],
            row["sample"],
            f"{row['variants']['ours']['s'] * 1e6:,.0f} us",
            f"{row['bytes_per_s'] * 1e-9:.1f} GB/s",
            f"{row['times_faster']:.1f}x",
        )
        for row in rows
    ]
    return text_table(("operator", "largest sample", "ours", "rate", "plain torch takes"), lines)


def _step_text(found: dict[str, Any]) -> str:
    lines = [
        (
            name,
            f"{each['s'] * 1e3:.1f} ms",
            f"{each['p20_s'] * 1e3:.1f} .. {each['p80_s'] * 1e3:.1f}",
            f"{found['scenes_per_s'][name]:,.0f}",
            f"{found['times_slower_than_ours'][name]:.2f}x",
            f"{each['undisturbed']:.0f} of {each['undisturbed'] + each['disturbed']:.0f}",
        )
        for name, each in sorted(found["variants"].items(), key=lambda item: item[1]["s"])
    ]
    table = text_table(("step", "median", "20 .. 80 %", "scenes/s", "of ours", "undisturbed"), lines)
    compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["compile_and_first_step_s"].items())
    return (
        f"{found['model']}, {found['parameters']:,} parameters, batch {found['batch_size']},"
        f" {found['precision']}\n{table}\nfirst compiled step, apart: {compiled or 'not compiled'}\n"
        f"{_utilisation(found)}"
    )


def _train_text(found: dict[str, Any]) -> str:
    sizes = [
        (
            f"{row['batch_size']:,}",
            f"{row['scenes_per_s']:,.0f}" if row["scenes_per_s"] else row["error"],
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB" if row["scenes_per_s"] else "-",
        )
        for row in found["by_batch"]
    ]
    parts = [
        f"{found['model']}, preset {found['preset']}: the trainer's loop, simulation and features included",
        text_table(("batch", "scenes/s", "peak memory"), sizes),
    ]
    if times := found.get("phases"):
        lines = [(name, f"{times['s'][name] * 1e3:.2f} ms", f"{share:.0%}") for name, share in times["share"].items()]
        parts += ["", text_table((f"phase, batch {times['batch_size']:,}", "time", "share"), lines), ""]
    parts += [_utilisation(found["efficiency"])] if "efficiency" in found else []
    parts += [f"a step: {_counts(found['counts'])}"] if "counts" in found else []
    if power := found.get("energy"):
        joules = power["joules_a_scene"]
        parts.append(f"energy: {joules * 1e3:.2f} mJ a scene" if joules else f"energy: {power['note']}")
    return "\n".join(parts)


def _counts(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.0f}" if isinstance(value, float) else f"{value}"
        for name, value in found.items()
    )


def _utilisation(found: dict[str, Any]) -> str:
    return (
        f"{found['flop_per_s'] * 1e-9:,.0f} GFLOP/s of useful products, {found['mfu']:.0%} of the "
        f"{found['peak_matmul_flop_per_s'] * 1e-9:,.0f} that one large matrix product reaches here, the best of many"
    )
