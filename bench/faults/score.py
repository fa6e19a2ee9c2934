"""Scores the rules: which faults they detect, when, whether they name the cause first, and their false alarms.

    python -m bench.faults.score [--set SET ... | --all | --held-out | --only NAME ...] [--afterwards] [--no-loops]
    [--healthy N] [--everything] [--show] [--json FILE] [--jobs N]

With nothing chosen it scores every set of trainer faults and every group of plain loops; with --everything beside
that what `why` says of the rows alone, 500 healthy runs, and right loops from a second seed. A fault counts as
detected if anything is reported by the time that its record allows, unless the same is reported of its healthy twin;
as named if the first cause reported is one that its record expects. With --afterwards each fault is run a second time
with nothing checked or watched, and `why` answers from the rows that it leaves. Of sets that a person who writes
rules should not see only totals are printed and kept in the file, unless --show is given; so that person can run
everything. Behind a share stands its 95 % Wilson interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.faults.afterwards import score_afterwards
from bench.faults.catalogue import FAMILIES, HELD_OUT_SUITE, SETS, SUITE, Fault, all_faults
from bench.faults.loops.__main__ import line as loop_line
from bench.faults.loops.catalogue import Loop, all_loops
from bench.faults.loops.trial import Judged, judge_loop
from bench.faults.trial import Outcome, score_fault, score_healthy, twin_fault

HEALTHY_RUNS = 500  # of --everything
SEEDS_OF_RIGHT_LOOPS = 2  # of --everything
LOOPS = "loops"  # what --set calls all of them
KEYS = {SUITE: "tuned", HELD_OUT_SUITE: "held_out"}  # what results call the sets of the suite
RIGHT = "right loop "
LATE = 2**31  # a limit in steps that nothing reaches

Case = tuple[str, str | int]


def run_case(case: Case) -> Outcome | Judged:
    """`case`: "healthy", "loop", "twin" or "fault", the last two also with " afterwards"; and its number or name. Of a
    right loop from another seed the kind is "right loop SEED"."""
    kind, name = case
    if kind.startswith(RIGHT):
        return judge_loop(all_loops()[str(name)], int(kind.removeprefix(RIGHT)))
    if kind == "healthy":
        return score_healthy(int(name))
    if kind == "loop":
        return judge_loop(all_loops()[str(name)])
    score = score_afterwards if kind.endswith(" afterwards") else score_fault
    return score(twin_fault(str(name)) if kind.startswith("twin") else all_faults()[str(name)])


def one_thread() -> None:
    torch.set_num_threads(1)


def run_cases(cases: Sequence[Case], jobs: int) -> Iterable[Outcome | Judged]:
    if jobs == 1:
        one_thread()
        yield from map(run_case, cases)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(run_case, cases)


def with_twins(faults: Sequence[Outcome], twins: Mapping[str, Outcome]) -> list[Outcome]:
    """Each outcome with what was said about its healthy twin."""
    records = all_faults()
    return [replace(outcome, twin_said=twins[records[outcome.name].twin_name].said) for outcome in faults]


# ---- totals --------------------------------------------------------------------------------------------------------


def wilson(found: int, of: int) -> list[float]:
    """The 95 % interval of a share: [low, high]."""
    if not of:
        return [0.0, 1.0]
    z = 1.959964
    share, weight = found / of, z * z / of
    middle, half = share + weight / 2, sqrt(weight * (share * (1 - share) + weight / 4))
    return [max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))]


def share(name: str, found: Iterable[bool]) -> dict[str, Any]:
    """A share by name, and its interval under the name with '_95'."""
    values = [bool(value) for value in found]
    return {name: sum(values) / max(1, len(values)), f"{name}_95": wilson(sum(values), len(values))}


def totals(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "faults": len(outcomes),
        **share("detected", (o.detected for o in outcomes)),
        **share("named_first", (o.named for o in outcomes)),
        **share("detected_late_too", (o.ever for o in outcomes)),
        "crashed": sum(bool(o.crashed) for o in outcomes),
        "seconds": sum(o.seconds for o in outcomes),
    }


def by_set(faults: Sequence[Outcome]) -> dict[str, Any]:
    """Totals of the suite of 2026-07 as 'all', of its tuned and its held-out part, and of each later set; by family
    too, but for sets that nobody should see."""
    records = all_faults()
    written = {o.name: records[o.name].written if o.name in records else _suite(o) for o in faults}
    sets = {"all": [o for o in faults if written[o.name] in KEYS]} | {
        KEYS.get(name, name): [o for o in faults if written[o.name] == name] for name in SETS
    }
    return {
        name: {"total": totals(each), **({} if name in SETS else _by_family(each))}
        for name, each in sets.items()
        if each
    }


def _suite(outcome: Outcome) -> str:
    return HELD_OUT_SUITE if outcome.held_out else SUITE


def _by_family(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    families = {family: [o for o in outcomes if o.family == family] for family in FAMILIES}
    return {family: totals(each) for family, each in families.items() if each}


def summary(faults: Sequence[Outcome], healthy: Sequence[Outcome]) -> dict[str, Any]:
    """Totals of all sets; false alarms and stops of healthy runs."""
    alarms = [bool(o.said or o.stopped or o.crashed) for o in healthy]
    return {
        **by_set(faults),
        "healthy": {
            "runs": len(healthy),
            "false_alarms": sum(alarms),
            "false_alarms_95": wilson(sum(alarms), len(alarms)),
            **share("accused_certainly", (any(o.certain) or bool(o.stopped) for o in healthy)),
            "stopped": sum(bool(o.stopped) for o in healthy),
            "crashed": sum(bool(o.crashed) for o in healthy),
        },
    }


def loop_totals(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of each group, and of all: mistakes, and right loops or twins with how many are accused."""
    groups = {"all": list(judged)} | {
        group: [each for each in judged if each.twin.group == group]
        for group in dict.fromkeys(each.twin.group for each in judged)
    }
    return {name: _loops(each) for name, each in groups.items() if each}


def right_loop_totals(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of loops that have no mistake: their kinds, runs from all seeds, and how many are accused."""
    return {
        "kinds": len({each.twin.name for each in judged}),
        "runs": len(judged),
        **share("accused", (each.accused for each in judged)),
        **share("accused_certainly", (each.accused_certainly for each in judged)),
        "crashed": sum(bool(each.twin.crashed) for each in judged),
    }


def _loops(judged: Sequence[Judged]) -> dict[str, Any]:
    wrong = [each for each in judged if each.mistake]
    runs = [run for each in judged for run in (each.twin, each.mistake) if run]
    return {
        "mistakes": len(wrong),
        **share("detected", (each.detected for each in wrong)),
        **share("named_first", (each.named for each in wrong)),
        "right": len(judged),
        **share("accused", (each.accused for each in judged)),
        **share("accused_certainly", (each.accused_certainly for each in judged)),
        "crashed": sum(bool(run.crashed) for run in runs),
        "seconds": sum(run.seconds for run in runs),
    }


# ---- what may be seen ----------------------------------------------------------------------------------------------


def hidden(outcome: Outcome | Judged, *, in_file: bool = False) -> bool:
    """Whether only totals of its set are shown. The file has had the held-out part of the suite from the start."""
    if isinstance(outcome, Judged):
        return outcome.twin.group.startswith("unseen")
    record = all_faults().get(outcome.name.removeprefix("twin ").removesuffix(" afterwards"))
    return record is not None and record.hidden and not (in_file and record.held_out)


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
    late = f" by step {outcome.limit}" if outcome.limit < LATE else ""
    wanted = f" | wanted {' or '.join(outcome.expect)}{late}" if outcome.expect and not outcome.named else ""
    return f"{verdict:9}{outcome.family:11}{outcome.name:36}{where:>10} {outcome.seconds:5.1f} s  {said}{wanted}"


def percent(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_95"]
    return f"{row[name]:7.1%} ({low:.0%} to {high:.0%})"


def table(result: Mapping[str, Any]) -> str:
    """Trainer faults by set and family, afterwards too, then loops by group, then healthy runs."""
    lines: list[str] = []
    for title, sets in (("", result), ("afterwards", result.get("afterwards", {}))):
        rows = {name: each for name, each in sets.items() if "total" in each}
        if rows:
            lines.append(f"{title:16}{'family':12}{'faults':>7}{'detected':>24}{'named first':>24}{'crashed':>9}")
        lines += [
            f"{name:16}{family:12}{row['faults']:7}{percent(row, 'detected'):>24}{percent(row, 'named_first'):>24}"
            f"{row['crashed']:9}"
            for name, each in rows.items()
            for family, row in each.items()
        ]
    if loops := result.get("loops"):
        lines.append(f"{'loops':28}{'faults':>7}{'detected':>24}{'named first':>24}{'twins accused':>24}{'crashed':>9}")
        lines += [
            f"{name:28}{row['mistakes']:7}{percent(row, 'detected'):>24}{percent(row, 'named_first'):>24}"
            f"{percent(row, 'accused'):>24}{row['crashed']:9}"
            for name, row in loops.items()
        ]
    healthy = result["healthy"]
    if healthy["runs"]:
        low, high = healthy["false_alarms_95"]
        lines.append(
            f"healthy   {healthy['runs']} runs, {healthy['false_alarms']} false alarms "
            f"({healthy['false_alarms'] / healthy['runs']:.2%}, {low:.2%} to {high:.2%}), {healthy['stopped']} stopped,"
            f" with certainty{percent(healthy, 'accused_certainly')}"
        )
    if right := result.get("right_loops"):
        lines.append(
            f"right     {right['runs']} loops of {right['kinds']} kinds, accused{percent(right, 'accused')}, with "
            f"certainty{percent(right, 'accused_certainly')}, {right['crashed']} crashed"
        )
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------------------------


def sets_of(wanted: Sequence[str]) -> set[str]:
    """Names of sets and groups of loops, each given whole, by its key in the results, or by a part of either."""
    groups = dict.fromkeys(loop.group for loop in all_loops().values())
    names = {name: (name, KEYS.get(name, name)) for name in SETS} | {group: (group,) for group in groups}
    found: set[str] = set()
    for each in wanted:
        same = [name for name, known in names.items() if each in known]
        part = [name for name, known in names.items() if any(each in one for one in known)]
        of_loops = list(groups) if each == LOOPS else []
        if not (some := of_loops or same or part):
            raise SystemExit(f"score: there is no set '{each}'. There are: {LOOPS}, {', '.join(names)}.")
        found |= set(some)
    return found


def chosen(arguments: argparse.Namespace) -> list[Fault]:
    """The trainer faults that are scored."""
    faults = all_faults()
    unknown = [name for name in arguments.only if name not in faults]
    if unknown:
        seen = ", ".join(name for name, fault in faults.items() if not fault.hidden)
        raise SystemExit(f"score: there is no fault {', '.join(unknown)}. There are: {seen}.")
    if arguments.only:
        return [faults[name] for name in arguments.only]
    wanted = {HELD_OUT_SUITE} if arguments.held_out else set(KEYS) if arguments.all else set(SETS)
    if arguments.set:
        wanted = sets_of(arguments.set)
    return [fault for fault in faults.values() if fault.written in wanted]


def chosen_loops(arguments: argparse.Namespace) -> list[Loop]:
    """The plain loops that are scored: all, unless something was chosen that does not name them."""
    if arguments.only or arguments.held_out or arguments.all or arguments.no_loops:
        return []
    groups = sets_of(arguments.set) if arguments.set else None
    return [loop for loop in all_loops().values() if groups is None or loop.group in groups]


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m bench.faults.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parse.add_mutually_exclusive_group()
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SET",
        help=f"these sets, by a part of their names; '{LOOPS}': all loops",
    )
    group.add_argument("--held-out", action="store_true", help="the third of the suite that rules are not tuned on")
    group.add_argument("--all", action="store_true", help="the whole suite of 2026-07")
    group.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these trainer faults, shown in full")
    parse.add_argument(
        "--afterwards", action="store_true", help="beside it what `why` says of rows alone, of runs without any check"
    )
    parse.add_argument("--no-loops", action="store_true", help="trainer faults alone")
    parse.add_argument("--healthy", type=int, default=None, metavar="N", help="healthy runs to watch as well")
    parse.add_argument("--healthy-only", action="store_true", help="healthy runs alone")
    parse.add_argument(
        "--everything",
        action="store_true",
        help=f"every set, --afterwards, --healthy {HEALTHY_RUNS}, right loops from {SEEDS_OF_RIGHT_LOOPS} seeds",
    )
    parse.add_argument("--show", action="store_true", help="every outcome, also of sets not to be seen yet")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the totals, and every outcome that may be seen")
    parse.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    return parse


def cases_of(given: argparse.Namespace) -> list[Case]:
    """Twins, then faults; both again for what is said afterwards; loops, right ones again; healthy runs."""
    faults = [] if given.healthy_only else chosen(given)
    loops = [] if given.healthy_only else chosen_loops(given)
    runs = given.healthy if given.healthy is not None else HEALTHY_RUNS if given.everything or given.healthy_only else 0
    cases: list[Case] = []
    for when in ("", " afterwards") if given.afterwards or given.everything else ("",):
        cases += [(f"twin{when}", name) for name in dict.fromkeys(fault.twin_name for fault in faults)]
        cases += [(f"fault{when}", fault.name) for fault in faults]
    cases += [("loop", loop.name) for loop in loops]
    for seed in range(1, SEEDS_OF_RIGHT_LOOPS if given.everything else 1):
        cases += [(f"{RIGHT}{seed}", loop.name) for loop in loops if not loop.expect]
    return cases + [("healthy", number) for number in range(runs)]


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    cases = cases_of(given)
    show = given.show or bool(given.only)
    found: dict[str, list[Any]] = {}
    for (kind, _), outcome in zip(cases, run_cases(cases, given.jobs)):
        found.setdefault(kind, []).append(outcome)
        if show or not hidden(outcome):
            print(loop_line(outcome) if isinstance(outcome, Judged) else line(called(kind, outcome)), flush=True)
    result, outcomes = results(found)
    print(table(result))
    if given.json:
        kept = [told(outcome) for outcome in outcomes if show or not hidden(outcome, in_file=True)]
        written = {"torch": torch.__version__, "summary": result, "outcomes": kept}
        given.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def results(found: Mapping[str, list[Any]]) -> tuple[dict[str, Any], list[Outcome | Judged]]:
    """The totals, and every outcome. Args: found: outcomes by the kind of their cases."""
    scored, twins = _scored(found, "")
    afterwards, twins_afterwards = _scored(found, " afterwards")
    healthy = found.get("healthy", [])
    result = summary(scored, [*twins, *healthy])
    if afterwards:
        quiet = summary(afterwards, twins_afterwards)
        result["afterwards"] = quiet
    if loops := found.get("loop", []):
        result["loops"] = loop_totals(loops)
    again = [each for kind, outcomes in found.items() if kind.startswith(RIGHT) for each in outcomes]
    if right := [*(each for each in loops if not each.mistake), *again]:
        result["right_loops"] = right_loop_totals(right)
    later = [called("fault afterwards", outcome) for outcome in afterwards]
    return result, [*scored, *later, *twins, *loops, *again, *healthy]


def called(kind: str, outcome: Outcome) -> Outcome:
    """With ' afterwards' behind the name of a run that nobody watched."""
    return replace(outcome, name=f"{outcome.name} afterwards") if kind.endswith(" afterwards") else outcome


def _scored(found: Mapping[str, list[Any]], when: str) -> tuple[list[Outcome], list[Outcome]]:
    """Faults beside their twins, and the twins."""
    twins = found.get(f"twin{when}", [])
    return with_twins(found.get(f"fault{when}", []), {o.name.removeprefix("twin "): o for o in twins}), twins


def told(outcome: Outcome | Judged) -> dict[str, Any]:
    """What the file keeps of one."""
    return asdict(outcome) | {"detected": outcome.detected, "named": outcome.named}


if __name__ == "__main__":
    raise SystemExit(main())
