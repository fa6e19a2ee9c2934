"""How measurements are made and told; no test here asserts a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ris_fast import timing as measure
from ris_fast.benchmarks import device as counted
from ris_fast.benchmarks import kernels, training
from ris_fast.benchmarks.train_step import compare_steps
from ris_fast.commands import bench
from ris_fast.commands.cli import main
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.timing import (
    Run,
    Stopped,
    Stopwatch,
    alternate,
    conditions,
    copy_bandwidth,
    peak_bytes,
    summary,
    times_slower,
)
from ris_fast.training.mfu import MfuCallback, peak_matmul_rate
from ris_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def small(preset: str, *_: object) -> Config:
    options = ["width=32", "depth=1"] if preset == "laptop" else ["width=32", "layers=1", "grid=5"]
    return load_config(
        None,
        preset,
        [
            "task.ris_horizontal=4",
            "task.ris_vertical=3",
            "task.bs_antennas=8",
            "health.preflight=false",
            *(f"model.options.{each}" for each in options),
        ],
        {"training.device": "cpu"},
    )


def test_summary_ignores_disturbed_repetitions() -> None:
    quiet = summary([Run(1.0, 1.0, 1.0, True), Run(9.0, 9.0, 9.0, False), Run(3.0, 3.0, 2.0, True)])
    assert quiet["s"] == 2.0 and quiet["processor_s"] == 1.5 and (quiet["undisturbed"], quiet["disturbed"]) == (2, 1)
    busy = summary([Run(9.0, 9.0, 9.0, False)])
    assert busy["s"] == 9.0 and busy["undisturbed"] == 0


def test_alternate_runs_variants_in_turns() -> None:
    order: list[str] = []
    alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, quiet=1, seconds=0.0, warm=1)
    assert order == ["a", "b", "a", "b"]
    order.clear()
    alternate({"a": lambda: order.append("a")}, CPU, quiet=1, seconds=0.0, warm=0, least=3)
    assert order == ["a"] * 3


def test_alternate_collects_garbage_before_and_not_between() -> None:
    import gc

    seen: list[bool] = []
    alternate({"a": lambda: seen.append(gc.isenabled())}, CPU, quiet=1, seconds=0.0, warm=1)
    assert seen == [True, False] and gc.isenabled()


def test_times_slower_divides_by_ours() -> None:
    found = {"a": {"s": 2.0, "processor_s": 3.0}, "b": {"s": 4.0, "processor_s": 9.0}}
    assert times_slower(found, 2.0) == {"a": 1.0, "b": 2.0}
    assert times_slower(found, 3.0, "processor_s") == {"a": 1.0, "b": 3.0}


def test_peak_bytes_is_the_highest_memory_of_a_call() -> None:
    held = peak_bytes(lambda: torch.ones(2**24).sum(), CPU)
    assert held == 0 or 2**25 < held < 2**28  # 0: the system does not say
    assert copy_bandwidth(CPU, 2**20) > 0


def test_stopwatch_laps_are_named_in_order() -> None:
    watch = Stopwatch(CPU)
    watch.lap("first"), watch.lap("second")
    laps = watch.read()
    assert list(laps) == ["first", "second"] and min(laps.values()) >= 0.0


def test_conditions_name_no_host() -> None:
    import platform

    found = conditions(CPU)
    assert found["gpus"] == "no GPU" or torch.cuda.is_available()
    assert found["versions"]["torch"] and platform.node() not in [*found.values(), *found["cpu"].values()]


def test_launches_and_waits_counts_operators_and_host_reads() -> None:
    found = counted.launches_and_waits(lambda: torch.ones(3).sum().item(), CPU)
    assert found["host_reads"] == 1.0 and found["operators"] >= 2
    assert counted.energy(lambda: None, CPU, 1) == {"joules_a_scene": None, "note": "no GPU"}


@pytest.mark.slow
def test_compare_steps_measures_every_contestant() -> None:
    found = compare_steps(small("original"), 4, compile=False, quiet=1, seconds=0.1)
    assert set(found["variants"]) == {"ours, eager", "eager loop", "original's step"}
    assert found["times_slower_than_ours"]["ours, eager"] == 1.0 and found["flops_a_step"] > 0
    assert "original's step" in bench._step_text(found)


def test_growth_is_an_exponent_over_the_keys() -> None:
    config = small("laptop")
    found = training.growth({depth: training.with_depth(config, depth) for depth in (1, 4)}, 4, seconds=0.1)
    assert set(found["s_a_scene"]) == {1, 4} and found["exponent"] == found["exponent"]
    assert training.with_array(config, 8).task.elements == 64


def test_time_to_target_is_none_where_not_reached() -> None:
    config = small("laptop")
    config = replace(config, training=replace(config.training, batch_size=16, compile=False))
    found = training.time_to_target(config, 0.5, every_steps=3, targets=(1e9, 0.0))
    assert found["seconds_to"]["0.0"] is None and found["seconds_to"]["1000000000.0"] == found["curve"][0][0]


@pytest.mark.slow
def test_bench_command_prints_tables_and_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "configured", small)
    monkeypatch.setattr(bench, "SIZES", {"cpu": (8,)})
    assert main(["bench", "train", "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    assert "scenes/s" in (out := capsys.readouterr().out) and "no GPU" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["train"]["by_batch"][0]["scenes_per_s"] > 0 and "commit" in found["conditions"]
    shares = found["train"]["phases"]["share"]
    assert set(shares) == set(training.PHASES) and sum(shares.values()) == pytest.approx(1.0)


def test_mfu_callback_adds_mfu_to_the_rows_of_a_run() -> None:
    from ris_fast.report.console import epoch_line

    config, rows = small("laptop"), training.Epochs()
    config = replace(
        config,
        training=replace(config.training, batch_size=16, epochs=2, max_seconds=0.0, compile=False),
        data=replace(config.data, train_scenes=64, val_scenes=16),
    )
    trainer = Trainer(config)
    trainer.callbacks += [MfuCallback(trainer), rows]
    trainer.fit()
    assert len(rows.rows) == 2 and all(0.0 < row["mfu"] < 1.0 for row in rows.rows)
    assert epoch_line(rows.rows[0] | {"mfu": 0.25}).endswith("25% MFU")


def test_bench_keeps_what_was_measured_before_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    calls = iter(range(100))

    def third_call_is_interrupted() -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Stopped) as stop:
        alternate({"a": third_call_is_interrupted}, CPU, quiet=9, seconds=60.0, warm=0, least=9)
    assert stop.value.found["a"]["undisturbed"] + stop.value.found["a"]["disturbed"] == 3
    compared = kernels._compared

    def second_operator_is_interrupted(*arguments: object) -> dict:
        if hasattr(second_operator_is_interrupted, "seen"):
            raise KeyboardInterrupt
        second_operator_is_interrupted.seen = True
        return compared(*arguments[:2], 1, 0.01)

    monkeypatch.setattr(kernels, "_compared", second_operator_is_interrupted)
    assert main(["bench", "kernels", "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 130
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["stopped"] == "kernels" and len(found["kernels"]) == 1
    assert (
        found["kernels"][0]["operator"] in (out := capsys.readouterr().out) and "stopped while measuring kernels" in out
    )


def test_peak_matmul_rate_is_the_fastest_of_many_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disturbed = [Run(5.0, 5.0, 5.0, False)] * 30
    disturbed[17] = Run(0.001, 0.001, 0.001, False)
    assert summary([Run(2.0, 2.0, 2.0, True), *disturbed])["fastest_s"] == 0.001
    times = iter([1.0, 1.0, 0.5, 1.0, 0.25, 1.0] + [1.0] * 10**4)
    monkeypatch.setattr(measure, "once", lambda call, device: Run(seconds := next(times), seconds, seconds, False))
    size = 128 * round(4.0 * torch.get_num_threads() ** 0.5)
    assert peak_matmul_rate(CPU, seconds=0.01) == pytest.approx(2.0 * size**3 / 0.25)
