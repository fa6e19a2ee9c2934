"""What a person should know of .npz files before training on them, one line each."""

from __future__ import annotations

import math

from torch import Tensor

from ris_fast.config.schema import Task
from ris_fast.data.geometry import CENTRED
from ris_fast.data.npz_load import APART, Facts, clearly_apart

BEYOND_DB = 0.5  # labels that are measured go a little beyond the range that was asked for
OFTENER = 3.0  # times as often as other labels, that those which were clipped come
NO_CHANNEL = (
    "no H_full in the files: the map from measurement to aperture is lost, and the validation "
    "NMSE will stay near 0.97 however well the optimizer works; generate the shards with H_full"
)


def geometry_notes(facts: Facts) -> list[str]:
    """Where the files' array is off-centre, and what that does to the labels."""
    notes = []
    if facts.offset != CENTRED:
        notes.append(
            f"the files' array is off-centre by {_spacings(facts.offset)}: source positions are "
            "re-expressed for the centred array, which leaves every covariance as it is"
        )
    if facts.clamped:
        notes.append(
            f"sources so near the edge that their shifted direction does not exist: {facts.clamped}; "
            "their angle labels are the nearest that do, their covariances are exact"
        )
    return notes


def fit_note(fit: Tensor) -> str:
    """Why R is no exact sum over its own sources. Args: fit: NMSE of R on its own sources, (scenes,)."""
    apart = clearly_apart(fit)
    said = (
        f"R is not exactly a sum over its own sources: NMSE {float(fit.median()):.2g} at the median, "
        f"{float(fit.max()):.2g} at most; the dense R is used as the target"
    )
    if apart == 0:
        return f"{said}. Element jitter, or a slightly different array, does this"
    return (
        f"{said}. In {apart} of {fit.numel()} train scenes (NMSE above {APART:g}) R does not belong to the scene's"
        " sources, or the task's array is not the one of the files"
    )


def channel_notes(facts: Facts) -> list[str]:
    """Scenes whose H is not H_full c_l, and the likely reason."""
    if not facts.wrong_channel:
        return []
    why = (
        ", but H_full times the conjugate of c_l: the codes are conjugated, in the files or in H"
        if 2 * facts.conjugate_codes > facts.wrong_channel
        else ": H, H_full or the codes are wrong"
    )
    return [f"in {facts.wrong_channel} scenes H is not H_full c_l{why}"]


def snr_notes(snr: Tensor, task: Task) -> list[str]:
    """Labels beyond the task's range, and labels that were clipped; one label for all is neither. Args: snr: (scenes,)
    dB."""
    values, counts = snr.unique(return_counts=True)  # values ascend
    ends = dict(zip(values[[0, -1]].tolist(), counts[[0, -1]].tolist()))
    usual = float(counts[1:-1].float().median()) if len(values) > 2 else math.inf  # of steps, or of scenes of a walk
    many = max(3, 0.002 * snr.numel(), OFTENER * usual)
    clipped = [f"{count} at {end:g} dB" for end, count in ends.items() if count > many]
    notes = []
    if max(ends) > task.snr_max_db + BEYOND_DB:
        notes.append(f"snr labels go up to {max(ends):.3g} dB; the task says {task.snr_max_db:g}")
    elif min(ends) < task.snr_min_db - BEYOND_DB:
        notes.append(f"snr labels go down to {min(ends):.3g} dB; the task says {task.snr_min_db:g}")
    if clipped:
        notes.append(f"snr labels pile up at an end ({', '.join(clipped)}): they were clipped there")
    return notes


def _spacings(offset: tuple[float, float]) -> str:
    """'half an element in both axes', '1.25 elements in x and -3 in y'."""
    named = {(-0.5, -0.5): "both axes", (-0.5, 0.0): "x", (0.0, -0.5): "y"}.get(offset)
    x, y = (round(each, 3) + 0.0 for each in offset)  # adding zero, minus zero loses its sign
    return f"half an element in {named}" if named else f"{x:g} elements in x and {y:g} in y"
