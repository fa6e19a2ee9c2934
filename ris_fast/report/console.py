"""What a person sees while a run trains: the baselines, a line an epoch, a live bar on a terminal, the outcome."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from ris_fast.report.baselines import baseline_lines, figure, judge, milestone_line
from ris_fast.report.verdict import explanation_lines, lost_again, stalled_because
from ris_fast.training.callback import Callback

BAR_WIDTH = 24


class ConsoleReport(Callback):
    """Prints. On a terminal with a bar, time left and colours; plain lines in a file or a pipe.

    Args:
        stream: where to print; standard output by default.
        standard_task: whether the milestones, which hold for RIS-12x12 only, are shown.
        run: folder of the run, for the command that says more of it.
    """

    def __init__(self, stream: TextIO | None = None, *, standard_task: bool = True, run: Path | None = None) -> None:
        stream = stream or sys.stdout
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.console = Console(
            file=stream,
            force_terminal=live,
            highlight=False,
            markup=False,
            soft_wrap=True,
            no_color=True if not live else None,
        )
        self.standard_task, self.run = standard_task, run
        self.baselines: Mapping[str, float] = {}
        self.info: Mapping[str, Any] = {}
        self.best = math.inf
        self.shown_notes: set[str] = set()
        self.bar = _progress(self.console) if live else None
        self.task: TaskID | None = None

    def on_train_start(self, info: dict[str, Any]) -> None:
        self.info, self.baselines = info, info.get("baselines", {})
        for line in run_lines(info):
            self._print(line)
        self.show_notes(info.get("notes", ()))
        if self.baselines:
            self._print(
                "Validation NMSE: lower is better, and a network that has learned nothing stays at the baselines."
            )
            self._print("\n".join(baseline_lines(self.baselines, info.get("mmse_bound"))))
        if self.baselines and self.standard_task:
            self._print(milestone_line(), "dim")
        if self.bar is not None:
            self.task = self.bar.add_task("starting", total=1.0, loss="", end=None)
            self.bar.start()

    def on_log(self, row: dict[str, Any]) -> None:
        self._move_bar(row)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        score = validation(row)
        better = score < self.best
        self.best = min(self.best, score)
        self._print(epoch_line(row), "bold green" if better and score < self.baselines.get("mean", 1.0) else None)
        self._move_bar(row)

    def show_notes(self, notes: Iterable[str]) -> None:
        """What a person should read before training, each line once."""
        for note in notes:
            if note not in self.shown_notes:
                self._print(f"note: {note}", "bold yellow")
                self.shown_notes.add(note)

    def found(self, finding: Any) -> None:
        """A finding of the watch, at once and in three lines, above the bar where there is one."""
        when = "before the first step" if finding.step == 0 else f"at step {finding.step:,}"
        self._print(
            f"found {when}{'' if finding.certain else ', not certain'}: {finding.cause}: {finding.evidence}",
            "bold yellow",
        )
        self._print(f"  fix: {finding.advice}\n  more: ris-fast why --explain {finding.cause}")

    def on_train_end(self, summary: dict[str, Any]) -> None:
        self.close()
        for line in outcome_lines(summary, milestones=self.standard_task, run=self.run):
            self._print(line)

    def close(self) -> None:
        """Takes the bar away; safe to call at any time, also after an interrupt."""
        if self.bar is not None:
            self.bar.stop()

    def _move_bar(self, row: Mapping[str, Any]) -> None:
        if self.bar is None or self.task is None:
            return
        share = share_done(row, self.info)
        end = time.monotonic() + row["seconds"] * (1.0 - share) / share if share > 0.0 else None
        self.bar.update(
            self.task,
            completed=share,
            loss=f"loss {row['train_loss']:.3f}",
            end=end,
            description=f"epoch {row['epoch']}/{row['epochs']}",
            refresh=True,
        )

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(Text(text, style=style or ""))


def counter(what: str, stream: TextIO | None = None) -> Callable[[int, int], None]:
    """Shows a bar, `what done of total` and the time left in place on a terminal; silent in a file."""
    stream, began = stream or sys.stderr, time.monotonic()

    def show(done: int, total: int) -> None:
        if stream.isatty():
            filled = BAR_WIDTH * done // max(1, total)
            left = round((time.monotonic() - began) * (total - done) / max(1, done))
            bar = f"[{'=' * filled}{' ' * (BAR_WIDTH - filled)}]"
            text = f"\r\x1b[2K{what} {bar} {done:,} of {total:,}" + (f", {left} s left" if done < total else "")
            print(text, end="\n" if done == total else "", file=stream, flush=True)

    return show


def epoch_line(row: Mapping[str, Any]) -> str:
    """`Epoch 001/030: train 0.806  val 1.921 ...`; `val` is the better of the raw and the averaged weights."""
    parts = [
        f"Epoch {row['epoch']:03d}/{row['epochs']:03d}: train {figure(row['train_loss'])}",
        f"val {figure(validation(row))}",
        " ".join(f"{name} {figure(row[key])}" for name, key in _WEIGHTS if _known(row, key)),
        f"|g| {row['grad_norm']:.3g}",
        f"clipped {row['clipped']:.0%}",
        f"skipped {row['skipped']:.0%}",
        f"{row['scenes_per_s']:.0f} scenes/s",
        f"{row['mfu']:.0%} MFU" if _known(row, "mfu") else "",
    ]
    return "  ".join(part for part in parts if part)


def validation(row: Mapping[str, Any]) -> float:
    """The better of the raw and the averaged weights' NMSE; not-a-number only when neither is a number."""
    scores = [row[key] for _, key in _WEIGHTS if _known(row, key) and not math.isnan(row[key])]
    return min(scores, default=math.nan)


def share_done(row: Mapping[str, Any], info: Mapping[str, Any]) -> float:
    """How much of the run is over: the larger share of the planned steps and of the allowed seconds."""
    steps = row.get("planned_steps") or info.get("planned_steps") or math.inf
    seconds = info.get("max_seconds") or math.inf
    return min(1.0, max(row["step"] / steps, row["seconds"] / seconds))


def run_lines(info: Mapping[str, Any]) -> list[str]:
    """The run in a few lines, from whichever of the facts are there."""
    what = [
        info.get("preset"),
        _phrase(info, "parameters", "{}, {:,} parameters", "model"),
        " ".join(str(info[key]) for key in ("device", "precision") if info.get(key)),
    ]
    how = [
        _phrase(info, "train_scenes", "{:,} scenes an epoch"),
        _phrase(info, "batch_size", "batch {}"),
        _phrase(info, "accumulate", "accumulated {}") if info.get("accumulate", 1) > 1 else None,
        _phrase(info, "epochs", "up to {} epochs"),
        _phrase(info, "max_seconds", "at most {:.0f} s"),
    ]
    lines = (
        "  ".join(filter(None, what)),
        info.get("source"),
        ", ".join(filter(None, how)),
        info.get("compile"),
        peak_rate_line(info),
    )
    return [line for line in lines if line]


def peak_rate_line(info: Mapping[str, Any]) -> str | None:
    """What the peak matmul rate is that an epoch's line names a share of."""
    rate = info.get("peak_matmul_flop_per_s")
    return rate and (
        f"the peak matmul rate: {rate / 1e9:,.0f} GFLOP/s, one large {info.get('precision', 'fp32')} matrix product on"
        " this machine, the best of many; the network's own forward and backward products are counted, features, loss"
        " and simulation are not"
    )


def outcome_lines(summary: Mapping[str, Any], *, milestones: bool = True, run: Path | None = None) -> list[str]:
    """The verdict, the best figure beside its baseline, the size of the run, and what the watch found."""
    best = (
        stalled_because(summary)
        if summary["verdict"] == "stalled"
        else judge(
            summary.get("best_val_nmse"),
            summary.get("baselines", {}),
            mmse_bound=summary.get("mmse_bound"),
            milestones=milestones,
        )
    )
    lines = [
        f"{summary['verdict']}: best validation NMSE {best}",
        *lost_again(summary),
        (
            f"{summary['optimizer_steps']:,} steps, {summary['scenes_seen']:,} scenes in {summary['seconds']:.0f} s, "
            f"{summary['scenes_per_s']:.0f} scenes/s"
        ),
    ]
    if summary.get("findings"):
        lines.append("findings, most certain first: " + ", ".join(map(str, summary["findings"])))
        lines += certain_findings(summary)
    lines += explanation_lines(summary)
    if run and len(lines) > 2:
        lines.append(f"  more: ris-fast why {shlex.quote(str(run))}")
    return lines


def certain_findings(summary: Mapping[str, Any]) -> list[str]:
    """What was seen of every certain finding, or of the first, and how it is fixed; nothing for a run that they
    stopped, whose error says so."""
    if summary["verdict"] == "stopped":
        return []
    reported = [each for each in summary.get("evidence", ()) if each["cause"] in summary["findings"]]
    shown = [each for each in reported if each["certain"]] or [
        each for each in reported if each["cause"] == summary["findings"][0]
    ]
    named = (f"{each['cause']}: " if len(shown) > 1 else "" for each in shown)
    return [
        line
        for name, each in zip(named, shown)
        for line in (
            f"  {name}seen{'' if each['certain'] else ' (not certain)'}: {each['evidence']}",
            f"  fix: {each['advice']}",
        )
    ]


_WEIGHTS = (("raw", "val_nmse_raw"), ("ema", "val_nmse_ema"))


def _known(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) is not None


def _phrase(info: Mapping[str, Any], key: str, pattern: str, before: str | None = None) -> str | None:
    if not info.get(key):
        return None
    return pattern.format(info.get(before, ""), info[key]) if before else pattern.format(info[key])


class TimeLeft(ProgressColumn):
    """Counts down to the end that the last report foresaw; reports are too far apart for the library's own estimate."""

    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        return Text(f"left {timedelta(seconds=max(0, round(end - time.monotonic())))}" if end is not None else "")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeLeft(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        transient=True,
        refresh_per_second=2,
    )
