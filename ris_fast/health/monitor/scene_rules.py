"""Rules over scenes: as they are served to the steps, and as the validation of an epoch scores each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ris_fast.health.finding import Finding
from ris_fast.health.monitor.epoch_rules import constant
from ris_fast.health.monitor.history import Row, Rule, RunHistory, validated
from ris_fast.training.scene_scores import BY_ORDER

SHARE = 0.75  # of a step's scenes: fewer different targets are several scenes' each
ENOUGH, SHARED = 4, 0.01  # scenes of training that are validated too, and their share
AGAIN = 0.9  # of the scenes come again, where they are chosen on purpose

COMPARED = 32  # scenes of two epochs
LEARNED, UNLEARNED = 0.25, 0.8  # of the constant answer: two groups of scenes, one learned and one not
BETWEEN, FEW = 0.1, 0.03  # share of scenes in the middle of the way; least share of either group
BEGUN = 0.98  # of the constant answer, below which something has been learned
TOLD = 0.6  # of which group a scene is in, which a division explains
APART = 6.0  # standard errors between groups that differ by nothing but their place
EPOCHS = 2  # that show the same
LONG_ENOUGH = 200  # steps, after which two groups that nothing tells apart are more than a beginning


def served_scenes_of_every_step(run: RunHistory) -> Iterator[Finding]:
    """No step's scenes come again in their epoch, are validated too, or are others than an epoch before."""
    seen, fresh, own = run.reading.get("served") or {}, run.info.get("fresh"), bool(run.info.get("own_source"))
    if not seen:
        return
    chosen = own or bool(run.info.get("own_order"))  # as by a curriculum, which may serve a part of them again
    if seen["of_validation"] >= max(ENOUGH, SHARED * seen["scenes"]):
        yield run.finding(
            "split_overlap",
            f"{seen['of_validation']} of {seen['scenes']} scenes of the last steps are validated too, by their bytes.",
        )
    if run.info.get("masked_anew"):
        return  # bytes say nothing of which scene it is then
    total = [each for row in run.steps if (each := (row.get("health") or {}).get("served"))]
    again = [each for each in total if each.get("again_steps")]
    stale = any(
        2 * (_health(row, "repeated_with_other_target") or 0) > (_health(row, "scenes") or 1) for row in run.steps
    )
    if (
        not stale
        and seen.get("again_steps")
        and seen["scenes"] >= COMPARED
        and sum(each["again_steps"] for each in again) > 1
    ):
        yield run.finding(
            "repeated_batch",
            f"{seen['again']} of {seen['scenes']} scenes of the last steps were served before in the same epoch, in"
            f" {seen['again_steps']} steps most of them, the first step {seen['first_again'][0]} of this process.",
            certain=bool(fresh) and not chosen and seen["again"] > AGAIN * seen["scenes"],
        )
    if seen["compared"] < COMPARED:
        return
    share = seen["of_last_epoch"] / seen["compared"]
    if fresh and share > (AGAIN if chosen else 0.5):
        yield run.finding(
            "repeated_batch",
            f"{share:.0%} of the scenes are those of the epoch before, though every epoch should have fresh ones"
            " (data.fixed=false).",
            certain=not chosen,
        )
    elif not fresh and share < 0.5:
        yield run.finding(
            "scenes_change",
            f"{share:.0%} of the scenes are those of the epoch before, bit for bit, though the data set is fixed: its"
            " scenes are made or changed anew at every reading.",
            certain=not own and share == 0.0,
        )


def _health(row: Row, key: str) -> Any:
    return (row.get("health") or {}).get(key)


def one_scene_for_all(run: RunHistory) -> Iterator[Finding]:
    """The scenes of a step differ from one another, and a scene keeps its target."""
    reading = run.reading
    scenes, distinct = reading.get("scenes") or 0, reading.get("distinct") or 0
    if scenes < ENOUGH:
        return
    if distinct == 1 and not reading.get("zero_scenes"):
        yield run.finding("constant_input", f"all {scenes} scenes of a step have the same snapshots, bit for bit.")
    elif reading.get("distinct_targets") == 1:
        yield run.finding("constant_targets", f"all {scenes} scenes of a step have the same target, bit for bit.")
    elif _targets_became_one(run, scenes, distinct):
        yield run.finding(
            "shuffled_labels",
            f"{scenes} scenes of a step have {distinct} different snapshots and {reading['distinct_targets']} different"
            " targets, and in the first reports every scene had a target of its own: several scenes are given one"
            " scene's. The two likeliest: scene numbers are rounded on the way to the labels, as in 16 bits, or an"
            " index into the labels stops at an end.",
            certain=False,
        )
    elif 2 * (reading.get("repeated_with_other_target") or 0) > scenes and not reading.get("zero_scenes"):
        yield run.finding(
            "stale_cache",
            f"the snapshots of {reading['repeated_with_other_target']} of {scenes} scenes were served before, with"
            " another target: they belong to an earlier batch.",
        )


def _targets_became_one(run: RunHistory, scenes: int, distinct: int) -> bool:
    """Whether many scenes of a step share targets, and none did when the run began."""
    first = (run.steps[0].get("health") or {}) if run.steps else {}
    targets = run.reading.get("distinct_targets")
    return (
        bool(targets)
        and distinct == scenes
        and targets < SHARE * scenes
        and first.get("scenes") == first.get("distinct") == first.get("distinct_targets")
    )


def validation_scenes_stay(run: RunHistory) -> Iterator[Finding]:
    """Every epoch validates the same scenes."""
    scores = run.validation.get("scores") or {}
    raw, mean = (scores.get(name) or {} for name in ("raw", "ema"))
    before = ((run.epochs[-2].get("health") or {}).get("scores") or {}).get("raw") or {} if len(run.epochs) > 1 else {}
    if not raw.get("scenes_hash"):
        return
    if mean.get("scenes_hash") and mean["scenes_hash"] != raw["scenes_hash"]:
        yield run.finding(
            "scenes_altered",
            "the validation scenes are others when the averaged weights are scored than just before, when the raw ones"
            " were: what scores them writes into them.",
        )
    elif before.get("scenes_hash") and before["scenes_hash"] != raw["scenes_hash"]:
        yield run.finding(
            "scenes_change",
            "the validation scenes or their targets are not those of the epoch before, bit for bit: they are read anew,"
            " or something writes into them. Which of the two: score them twice in a row and compare their bytes.",
            certain=not run.info.get("own_source"),
        )


def part_not_learned(run: RunHistory) -> Iterator[Finding]:
    """Scenes are learned all alike, as far as they are alike."""
    baseline, seen = constant(run), [each for row in run.epochs[-EPOCHS:] if (each := _scenes(row))]
    if baseline is None or len(seen) < EPOCHS:
        return
    now, level = seen[-1], baseline[1]
    if FEW < now["exactly_one"] < 1.0 - FEW and all(FEW < each["exactly_one"] < 1 - FEW for each in seen):
        yield run.finding(
            "part_not_learned",
            f"{now['exactly_one']:.0%} of {now['scenes']} validation scenes have an NMSE of exactly 1, which an output"
            f" of zero has, and the others {_others(now):.3g}.{_told(now)}",
        )
        return
    if not validated(run.epochs[-1]) < BEGUN * level:
        return
    for name in BY_ORDER:
        worst = [_by_place(each, name) for each in seen]
        if all(worst) and len({each[0] for each in worst if each}) == 1:
            label, value, rest, errors, scenes = worst[-1]
            yield run.finding(
                "part_not_learned",
                f"validation scenes with {name} '{label}' have an NMSE of {value:.3g} and the others {rest:.3g},"
                f" {errors:.0f} standard errors apart in {EPOCHS} epochs, though their place says nothing of them.",
                certain=bool(run.info.get("fresh")) and scenes >= COMPARED,  # files may be in an order
            )
            return
    if not all(_in_two(each, level) for each in seen) or _hard_by_nature(now):
        return
    if run.step < LONG_ENOUGH and max(now["told_by"].values(), default=0.0) < TOLD:
        return  # at first some are learned before others, and nothing says that they would not follow
    split = now["split"]
    yield run.finding(
        "part_not_learned",
        f"{split['share_high']:.0%} of {now['scenes']} validation scenes have an NMSE of {split['high']:.3g}, the"
        f" constant answer {level:.3g}, and the others {split['low']:.3g}; {split['between']:.0%} lie between."
        f"{_told(now)}",
        certain=False,
    )


def _scenes(row: Row) -> Mapping[str, Any]:
    return (row.get("health") or {}).get("scenes") or {}


def _others(seen: Mapping[str, Any]) -> float:
    """The mean NMSE of the scenes that are not exactly 1."""
    values = [(count, mean) for _, count, mean, *_ in next(iter(seen["by"].values()), [])]
    total, mean = sum(count for count, _ in values), sum(count * each for count, each in values)
    if not total:
        return seen["split"]["low"]
    return (mean / total - seen["exactly_one"]) / (1.0 - seen["exactly_one"])


def _by_place(seen: Mapping[str, Any], name: str) -> tuple[str, float, float, float, int] | None:
    """The worst group of a division by place, its mean, that of the others, the standard errors between, where they are
    too many for chance, and its scenes."""
    rows = [row for row in seen["by"].get(name, ()) if row[1] >= 16]
    if len(rows) < 2:
        return None
    label, scenes, value, error, _ = max(rows, key=lambda row: row[2])
    rest = [row for row in rows if row[0] != label]
    count = sum(row[1] for row in rest)
    mean = sum(row[1] * row[2] for row in rest) / count
    spread = math.sqrt(sum((row[1] * row[3]) ** 2 for row in rest)) / count
    errors = (value - mean) / max(math.hypot(error, spread), 1e-12)
    return (label, value, mean, errors, scenes) if errors > APART and value > 1.5 * mean else None


def _in_two(seen: Mapping[str, Any], level: float) -> bool:
    split = seen["split"]
    return (
        FEW < split["share_high"] < 1.0 - FEW
        and split["low"] <= LEARNED * level
        and split["high"] >= UNLEARNED * level
        and split["between"] <= BETWEEN
    )


def _hard_by_nature(seen: Mapping[str, Any]) -> bool:
    """Whether noise tells the two groups apart: the lowest SNR is the group that is not learned."""
    rows = seen["by"].get("SNR (dB)") or []
    return len(rows) > 1 and seen["told_by"].get("SNR (dB)", 0.0) > 0.3 and rows[0][4] == max(row[4] for row in rows)


def _told(seen: Mapping[str, Any]) -> str:
    """What tells the two groups apart, as far as a division does."""
    known = [(name, share) for name, share in seen["told_by"].items() if seen["by"].get(name)]
    if not known:
        return ""
    name, share = max(known, key=lambda each: each[1])
    rows = seen["by"][name]
    high, low = max(rows, key=lambda row: row[4]), min(rows, key=lambda row: row[4])
    if share < TOLD:
        return f" Nothing that was recorded tells them apart; the nearest is {name}, which explains {share:.0%} of it."
    return (
        f" What tells them apart is {name}: of '{high[0]}' {high[4]:.0%} are not learned, of '{low[0]}' {low[4]:.0%}."
    )


SERVED_RULES: tuple[Rule, ...] = (served_scenes_of_every_step, one_scene_for_all)
SCENE_RULES: tuple[Rule, ...] = (validation_scenes_stay, part_not_learned)
