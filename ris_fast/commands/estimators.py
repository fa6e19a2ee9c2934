"""The estimators whose positions `ris-fast evaluate` scores: the network of a run, and classical ones beside it.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources (padded).
"""

from __future__ import annotations

from functools import partial

from ris_fast.commands.position_figures import Estimator
from ris_fast.config.schema import Task
from ris_fast.data.measurements import Measured
from ris_fast.inference.located import Located
from ris_fast.inference.predictor import Predictor
from ris_fast.localize.opponents import OPPONENTS, Answer
from ris_fast.localize.sources import Sources
from ris_fast.physics.scenes import Scenes

METHODS = {
    "likelihood": "maximum likelihood on the measurement",
    "music": "MUSIC on the network's covariance",
    "mvdr": "MVDR on the network's covariance",
    "pursuit": "the atoms of the pursuit",
}


def network_estimator(predictor: Predictor, method: str | None, count: int | str | None) -> Estimator:
    """What `ris-fast predict` finds with this method and count; see `Predictor.predict`."""

    def estimate(scenes: Scenes) -> Answer:
        located = predictor.predict_measured(measured(scenes), count=count, method=method)
        return Answer(located.factor, sources_of(located))

    return estimate


def opponents(task: Task) -> dict[str, Estimator]:
    """The classical estimators by name, for scenes with a channel."""
    return {name: partial(estimate, task) for name, estimate in OPPONENTS.items()}


def measured(scenes: Scenes) -> Measured:
    """What a network is shown of scenes, without their answers."""
    return Measured(scenes.snapshots, scenes.channel, scenes.effective_channel, scenes.codes, scenes.snr_db)


def sources_of(located: Located) -> Sources:
    """In radians, and zeros where there is no source."""
    place = (located.azimuth_deg.deg2rad(), located.elevation_deg.deg2rad(), located.range_m, located.power)
    return Sources(*(each.nan_to_num(0.0) for each in place), located.count)


def method_words(method: str, count: int | str | None) -> str:
    """How positions are found, for a person."""
    words = {
        "mdl": "counted by MDL",
        "aic": "counted by AIC",
        "network": "counted by the network",
        None: "as many as it has",
    }
    return f"{METHODS[method]}, {words.get(count, f'{count} in every scene')}"
