"""Scores the rules: which faults they detect, when, whether they name the cause first, and their false alarms.

    python -m bench.faults.score [--held-out | --all | --only NAME ...] [--afterwards] [--healthy N] [--json FILE]
    [--jobs N]

A fault counts as detected if anything is reported by the time that its record allows, unless the same is reported of
its healthy twin; as named if the first cause reported is one that its record expects. With --afterwards nothing is
checked or watched during the run, and `why` answers from the rows that it leaves. Of the held-out third only
totals are printed, so that a person who writes rules can run everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.faults.afterwards import score_afterwards
from bench.faults.catalogue import FAMILIES, Fault, all_faults
from bench.faults.healthy_twins import TWINS
from bench.faults.trial import Outcome, score_fault, score_healthy, twin_fault


def run_case(case: tuple[str, str | int]) -> Outcome:
    """`case`: "healthy", "twin" or "fault", the last two also with " afterwards"; and its number or name."""
    kind, name = case
    if kind == "healthy":
        return score_healthy(int(name))
    score = score_afterwards if kind.endswith(" afterwards") else score_fault
    return score(twin_fault(str(name)) if kind.startswith("twin") else all_faults()[str(name)])


def one_thread() -> None:
    torch.set_num_threads(1)


def run_cases(cases: Sequence[tuple[str, str | int]], jobs: int) -> Iterable[Outcome]:
    if jobs == 1:
        yield from map(run_case, cases)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(run_case, cases)


def with_twins(faults: Sequence[Outcome], twins: Mapping[str, Outcome]) -> list[Outcome]:
    """Each outcome with what was said about its healthy twin."""
    records = all_faults()
    return [replace(outcome, twin_said=twins[records[outcome.name].twin].said) for outcome in faults]


def totals(outcomes: Sequence[Outcome]) -> dict[str, float]:
    count = max(1, len(outcomes))
    return {
        "faults": len(outcomes),
        "detected": sum(o.detected for o in outcomes) / count,
        "named_first": sum(o.named for o in outcomes) / count,
        "detected_late_too": sum(o.ever for o in outcomes) / count,
        "crashed": sum(bool(o.crashed) for o in outcomes),
        "seconds": sum(o.seconds for o in outcomes),
    }


def summary(faults: Sequence[Outcome], healthy: Sequence[Outcome]) -> dict[str, Any]:
    """Totals of all, of the tuned and of the held-out faults, by family; false alarms and stops of healthy runs."""
    sets = {
        "all": faults,
        "tuned": [o for o in faults if not o.held_out],
        "held_out": [o for o in faults if o.held_out],
    }
    rows = {
        name: {
            "total": totals(each),
            **{
                family: totals([o for o in each if o.family == family])
                for family in FAMILIES
                if any(o.family == family for o in each)
            },
        }
        for name, each in sets.items()
        if each
    }
    alarms = [o for o in healthy if o.said or o.stopped or o.crashed]
    return {
        **rows,
        "healthy": {
            "runs": len(healthy),
            "false_alarms": len(alarms),
            "stopped": sum(bool(o.stopped) for o in healthy),
            "crashed": sum(bool(o.crashed) for o in healthy),
        },
    }


# ---- printing ------------------------------------------------------------------------------------------------------


def line(outcome: Outcome) -> str:
    """One run as one line."""
    verdict = (
        "CRASHED"
        if outcome.crashed
        else "named"
        if outcome.named
        else "detected"
        if outcome.detected
        else "late"
        if outcome.ever
        else "MISSED"
    )
    if outcome.family == "healthy" or not outcome.expect:
        verdict = "FALSE" if outcome.said or outcome.stopped or outcome.crashed else "silent"
    where = "-" if outcome.step is None else "preflight" if outcome.step == 0 else f"step {outcome.step}"
    said = (
        ", ".join(outcome.said[:3])
        or outcome.crashed
        or (f"stopped: {outcome.stopped}" if outcome.stopped else "nothing")
    )
    late = f" by step {outcome.limit}" if outcome.limit < 2**31 else ""
    wanted = f" | wanted {' or '.join(outcome.expect)}{late}" if outcome.expect and not outcome.named else ""
    return f"{verdict:9}{outcome.family:11}{outcome.name:36}{where:>10} {outcome.seconds:5.1f} s  {said}{wanted}"


def table(result: Mapping[str, Any]) -> str:
    lines = [f"{'':10}{'family':12}{'faults':>7}{'detected':>10}{'named':>8}{'late too':>10}{'crashed':>9}"]
    for name, rows in result.items():
        if name == "healthy":
            continue
        lines += [
            f"{name:10}{family:12}{row['faults']:7}{row['detected']:10.1%}{row['named_first']:8.1%}"
            f"{row['detected_late_too']:10.1%}{row['crashed']:9}"
            for family, row in rows.items()
        ]
    healthy = result["healthy"]
    if healthy["runs"]:
        lines.append(
            f"healthy   {healthy['runs']} runs, {healthy['false_alarms']} false alarms "
            f"({healthy['false_alarms'] / healthy['runs']:.2%}), {healthy['stopped']} stopped"
        )
    return "\n".join(lines)


def chosen(arguments: argparse.Namespace) -> list[Fault]:
    faults = all_faults()
    unknown = [name for name in arguments.only if name not in faults]
    if unknown:
        raise SystemExit(f"score: there is no fault {', '.join(unknown)}. There are: {', '.join(faults)}.")
    if arguments.only:
        return [faults[name] for name in arguments.only]
    return [fault for fault in faults.values() if arguments.all or fault.held_out == arguments.held_out]


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m bench.faults.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parse.add_mutually_exclusive_group()
    group.add_argument(
        "--held-out", action="store_true", help="the third that rules are not tuned on; prints totals only"
    )
    group.add_argument("--all", action="store_true", help="every fault")
    group.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these faults, shown in full")
    parse.add_argument(
        "--afterwards", action="store_true", help="no preflight and no watch: what `why` says of the rows alone"
    )
    parse.add_argument("--healthy", type=int, default=0, metavar="N", help="healthy runs to watch as well")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write every outcome and the totals")
    parse.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    faults = [] if given.healthy and not (given.all or given.held_out or given.only) else chosen(given)
    used = {fault.twin for fault in faults}
    when = " afterwards" if given.afterwards else ""
    cases = (
        [(f"twin{when}", name) for name in TWINS if name in used]
        + [(f"fault{when}", fault.name) for fault in faults]
        + [("healthy", number) for number in range(given.healthy)]
    )
    outcomes = []
    for outcome in run_cases(cases, given.jobs):
        outcomes.append(outcome)
        if given.only or not outcome.held_out:
            print(line(outcome), flush=True)
    twins = {outcome.name.removeprefix("twin "): outcome for outcome in outcomes[: len(used)]}
    scored = with_twins(outcomes[len(used) : len(used) + len(faults)], twins)
    result = summary(scored, [*twins.values(), *outcomes[len(used) + len(faults) :]])
    print(table(result))
    if given.json:
        given.json.write_text(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "summary": result,
                    "outcomes": [
                        asdict(o) | {"detected": o.detected, "named": o.named}
                        for o in [*scored, *twins.values(), *outcomes[len(used) + len(faults) :]]
                    ],
                },
                indent=1,
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
