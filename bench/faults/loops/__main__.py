"""Scores `watch` on plain PyTorch loops: which mistakes it detects and names, and which right loops it accuses.

    python -m bench.faults.loops [--group G] [--only NAME ...] [--show] [--jobs N]

Only totals of each group are printed, so that a person who writes rules can run everything; `--show` prints every loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from bench.faults.loops.catalogue import Loop, all_loops
from bench.faults.loops.trial import Judged, LoopOutcome, judge_loop


def one_thread() -> None:
    torch.set_num_threads(1)


def judge_all(loops: Sequence[Loop], jobs: int) -> Iterable[Judged]:
    """In the order of `loops`, each as soon as it is there."""
    if jobs == 1:
        one_thread()
        yield from map(judge_loop, loops)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(judge_loop, loops)


def said(outcome: LoopOutcome) -> str:
    causes = ", ".join(f"{cause}{'' if sure else '?'}" for cause, sure in zip(outcome.said, outcome.certain))
    return " ".join(part for part in (causes or "nothing", outcome.crashed and f"[{outcome.crashed}]") if part)


def line(judged: Judged) -> str:
    """One loop and its twin as one line; an uncertain cause ends with a question mark."""
    twin = judged.twin
    if judged.mistake is None:
        verdict = "ACCUSED" if judged.accused else "silent"
        return f"{verdict:9}{twin.group:22}{twin.name:36}{twin.seconds:5.1f} s  {said(twin)}"
    verdict = "named" if judged.named else "detected" if judged.detected else "MISSED"
    wanted = "" if judged.named else f" | wanted {' or '.join(judged.mistake.expect)}"
    accused = f" | TWIN: {said(twin)}" if judged.accused or twin.crashed else ""
    seconds = judged.mistake.seconds + twin.seconds
    return f"{verdict:9}{twin.group:22}{twin.name:36}{seconds:5.1f} s  {said(judged.mistake)}{wanted}{accused}"


def table(judged: Sequence[Judged]) -> str:
    """Totals of each group: mistakes, and right loops or twins with how many are accused, and how many for certain."""
    lines = [
        f"{'group':24}{'mistakes':>9}{'detected':>10}{'named':>8}{'right':>7}{'accused':>9}{'certainly':>11}"
        f"{'crashed':>9}{'seconds':>9}"
    ]
    for group in dict.fromkeys(each.twin.group for each in judged):
        of_group = [each for each in judged if each.twin.group == group]
        wrong = [each for each in of_group if each.mistake]
        runs = [run for each in of_group for run in (each.twin, each.mistake) if run]
        lines.append(
            f"{group:24}{len(wrong):9}{sum(each.detected for each in wrong):10}{sum(each.named for each in wrong):8}"
            f"{len(of_group):7}{sum(each.accused for each in of_group):9}"
            f"{sum(each.accused_certainly for each in of_group):11}{sum(bool(run.crashed) for run in runs):9}"
            f"{sum(run.seconds for run in runs):9.1f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.loops", description=__doc__.splitlines()[0])
    parser.add_argument("--group", action="append", help="loops of this group; may be given more than once")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="loops of these names")
    parser.add_argument("--show", action="store_true", help="a line for every loop")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="loops that run at the same time")
    chosen = parser.parse_args(arguments)
    loops = all_loops()
    groups = {loop.group for loop in loops.values()}
    if unknown := [name for name in chosen.only or () if name not in loops]:
        parser.error(f"there is no loop {', '.join(unknown)}")
    if unknown := [name for name in chosen.group or () if name not in groups]:
        parser.error(f"there is no group {', '.join(unknown)}; there are {', '.join(sorted(groups)) or 'none'}")
    picked = [
        loop
        for loop in loops.values()
        if (not chosen.group or loop.group in chosen.group) and (not chosen.only or loop.name in chosen.only)
    ]
    judged = []
    for each in judge_all(picked, chosen.jobs):
        judged.append(each)
        if chosen.show:
            print(line(each), flush=True)
    print(table(judged))


if __name__ == "__main__":
    main()
