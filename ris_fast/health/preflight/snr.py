"""Preflight of SNR labels against the snapshots: the sources explain as much of them as the label promises, no more and
no less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.health.finding import Finding
from ris_fast.health.preflight.pairing import CLEAR, SnrLabels, as_believed, measure_snr
from ris_fast.physics.scenes import Scenes

MANY, FEW_SCENES = 0.25, 16  # of the scenes that are measured, how many disagree; measured scenes
# of all scenes, and of those loud enough by their labels, how many must be measured: a few fit by chance
MEASURED, EXPECTED = 0.1, 1 / 3
FAR_DB, OFFSET_DB = 3.0, 1.5  # beyond the measurement's own deviation; of the median that is noted
LOOSE = 0.4  # of what is unexplained beyond the labels: its usual distance from the median, where it is one floor
ALIKE_DB = 1.5  # from the median, within which labels that are fixed agree


def as_measured(what: str, scenes: Scenes, task: Task) -> Scenes:
    """The scenes with the SNR that is left to whoever trusts codes and channel; with their own where these are exact
    after all, as in files of a task that speaks of errors."""
    believed = as_believed(scenes, task)
    if torch.equal(believed.snr_db, scenes.snr_db) or scenes.channel is None or scenes.factor is None:
        return believed
    static = task.symbols == "static"
    told = [labels_differ(what, each, static)[0] for each in (believed, scenes)]
    return scenes if told[0] is not None and told[1] is None else believed


def labels_differ(what: str, scenes: Scenes, static: bool) -> tuple[Finding | None, str]:
    """A finding where many labels are not the snapshots'; a note where all are off by a little."""
    found = measure_snr(scenes, static)
    measured = len(found.labels_db)
    if measured < max(FEW_SCENES, MEASURED * found.scenes, EXPECTED * found.loud):
        return None, ""
    far = found.away_db.abs() > FAR_DB + CLEAR * found.deviation_db
    middle = float(found.away_db.median())
    if float(far.float().mean()) < MANY and not _shifted_alike(found, middle):
        high = "high" if middle > 0 else "low"
        return None, (
            f"snr labels of the {what} scenes are {abs(middle):.1f} dB too {high} at the median"
            if abs(middle) > OFFSET_DB
            else ""
        )
    many = measured if float(far.float().mean()) < MANY else int(far.sum())
    seen = (
        f"in {many} of {measured} {what} scenes whose sources plainly are those of their snapshots, the snr"
        f" label is not the SNR that the snapshots have: labels {_ends(found.labels_db)}, measured"
        f" {_ends(found.measured_db)} dB"
    )
    how, advice = _how(found, middle)
    if not advice and (floor_db := _floor_db(found)) is not None:
        how = (
            f"beside what the labels say there is about as much unexplained in each, {floor_db:.1f} dB below the signal"
            " whatever the label. The two likeliest: noise of one strength was added and not labelled, or the channel"
            " or the codes are not exactly those of the snapshots, as of an estimate. Which: whether codes and channel"
            " are those that made the snapshots, bit for bit; for an estimated channel give task.channel_snr_db"
        )
        return Finding("snr_labels_differ", f"{seen}; {how}.", certain=False), ""
    return Finding("snr_labels_differ", f"{seen}; {how}.", advice=advice), ""


def shifted_by(scenes: Scenes, static: bool) -> float:
    """By how much the labels of all scenes are too high at the median, in dB."""
    return float(measure_snr(scenes, static).away_db.median())


def _shifted_alike(found: SnrLabels, middle: float) -> bool:
    """Whether labels that vary are all off by the same, though by too little to be told of one scene by itself: the
    median of many scenes is known much better than any of them."""
    error_db = float(found.deviation_db.median()) / math.sqrt(len(found.deviation_db))
    labels_vary = float(found.labels_db.max() - found.labels_db.min()) > FAR_DB
    off = abs(middle) > FAR_DB + CLEAR * error_db
    return off and labels_vary and _apart(found.away_db - middle) < ALIKE_DB and _floor_db(found) is None


def _floor_db(found: SnrLabels) -> float | None:
    """What is unexplained beyond the labels, below the signal in dB, where it is about the same in all scenes."""
    beyond = 10.0 ** (-found.measured_db / 10.0) - 10.0 ** (-found.labels_db / 10.0)
    middle = float(beyond.median())
    labels_vary = float(found.labels_db.max() - found.labels_db.min()) > FAR_DB
    if not labels_vary or not middle > 0 or float((beyond - middle).abs().median()) > LOOSE * middle:
        return None
    return -10.0 * math.log10(middle)


def _how(found: SnrLabels, middle: float) -> tuple[str, str]:
    """What would fix the labels: other units, one offset, or another order."""
    linear = found._replace(labels_db=10.0 * found.labels_db.clamp_min(1e-9).log10())
    if bool((found.labels_db > 0).all()) and _apart(linear.away_db) < min(ALIKE_DB, 0.5 * _apart(found.away_db)):
        return "read as linear ratios they agree", "Write snr in dB: 10 log10 of the ratio of signal to noise power."
    if _apart(found.away_db - middle) < ALIKE_DB:
        return (
            f"they are {abs(middle):.1f} dB too {'high' if middle > 0 else 'low'} at the median, all alike",
            "Write snr as 10 log10 of the ratio of signal to noise power in y, both summed over snapshots and"
            " antennas.",
        )
    if float(found.labels_db.max() - found.labels_db.min()) < ALIKE_DB:
        return "one label is given to scenes of very different SNR", ""
    away_db = _apart(found.away_db)
    return (
        f"they are {away_db:.1f} dB away at the median and neither in other units nor shifted: their order differs",
        "",
    )


def _apart(away_db: Tensor) -> float:
    return float(away_db.abs().median())


def _ends(values_db: Tensor) -> str:
    low, high = torch.aminmax(values_db)
    return f"{float(low):.3g} to {float(high):.3g}"
