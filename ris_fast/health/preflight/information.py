"""Preflight of the inputs' information: what a classical estimator makes of exactly what the network is shown.

A network cannot know more than its inputs. Where the channel would say something of the sources and an estimator on the
network's own inputs says next to nothing, it is the front end that withholds the answer, whatever the network learns.
Whether the network uses what they say shows only while it trains: `monitor/standstill.py` has the same figure.

Legend: B batch, N RIS elements, K columns of an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.pairing import with_factor
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.classical import Classical, classical_estimate
from ris_fast.models.prediction import Prediction
from ris_fast.physics.baselines import mean_covariance
from ris_fast.physics.channel import backproject
from ris_fast.physics.matched_filter import matched_filter, shrunk_nmse
from ris_fast.physics.real_complex import conj, to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.step import network_inputs
from ris_fast.training.validation import estimate_nmse, estimate_parts, scene_nmse

SCENES, FEWEST = 256, 64
MIN_GAIN = 0.05  # gain over the constant answer from which an estimate with the channel says something of the sources
NOTHING, MIN_SNR_DB = 0.01, -10.0  # gain of an estimate that knows nothing; dB of all snapshots and antennas together
LOUD = 20.0  # dB of all snapshots and antennas together from which an estimator finds most sources
EXAMINED, NONE = 16, 3e-6  # scenes; of the largest singular value: rounding, where lines of sight are nearly dependent
SAME = 1e-4  # of the size of what an antenna sees
PART = 0.25  # of that gain; the inputs that RIS-12x12 is meant for keep all of it, H c_l a twentieth


def estimate(context: PreflightContext, scenes: Scenes) -> Classical | None:
    """Of the scenes, from what the network is shown of them; None where nothing is known of the channel."""
    shown = context.model.features(*network_inputs(scenes))
    return classical_estimate(context.model, shown, scenes, static=_static(context))


def _static(context: PreflightContext) -> bool:
    return context.config.task.symbols == "static"


def gains(factor: Tensor, scenes: Scenes, constant: Tensor) -> tuple[float, float]:
    """Mean NMSE of the estimate, shrunk towards the constant answer as serves all scenes best, and of the constant
    answer."""
    shrunk, alone = shrunk_nmse(factor, scenes, constant)
    return float(shrunk.mean()), float(alone.mean())


def input_information(context: PreflightContext) -> Iterator[Finding]:
    """Beside the constant answer: the best of an estimator on the network's inputs, and of one with the channel
    itself."""
    source = context.trainer.source
    scenes = source.batch("train", torch.arange(min(SCENES, source.size("train"))))
    if scenes.channel is None or scenes.batch < FEWEST or not bool(scenes.snapshots.isfinite().all()):
        why = "the scenes have no channel" if scenes.channel is None else f"it takes {FEWEST} scenes"
        finite = bool(scenes.snapshots.isfinite().all())
        context.note = f"not checked: {why if finite else 'snapshots are not finite'}"
        return
    rank, most, alike = _equations(scenes)
    few = 2 * rank <= most
    if few and (alike or not context.config.task.channel):  # an own model of a few paths leaves a low rank
        yield Finding(
            "inputs_withhold_answer",
            f"a snapshot of {scenes.channel.shape[1]} antennas gives {rank} independent equations for the field on"
            f" {scenes.channel.shape[2]} elements, where it could give {most}: the channel has rank {rank}. Antennas"
            " that all see the same say nothing more.",
            certain=False,
        )
        return
    scenes = with_factor(scenes)
    constant, found = mean_covariance([scenes]), estimate(context, scenes)
    name, factor = found.name.replace("_", " "), found.factor
    if not found.field and not few and not context.known.get("parts apart"):  # which is seen in the scenes themselves
        yield from _worse_than_zero(name, factor, scenes)
    shown, alone = gains(factor, scenes, constant)
    known, _ = gains(
        matched_filter(backproject(scenes.channel, scenes.codes, scenes.snapshots), _static(context)), scenes, constant
    )
    worth = float(estimate_nmse(estimate_parts(found, scenes, constant)).mean())
    context.note = (
        f"{name} on the network's inputs {worth:.3f}, above which no run may stand still; constant answer {alone:.3f}"
    )
    total_snr_db = float(scenes.snr_db.median()) + 10 * math.log10(scenes.snapshots[0, ..., 0].numel())
    if total_snr_db < MIN_SNR_DB and known > (1 - NOTHING) * alone:
        yield Finding(
            "inputs_withhold_answer",
            "the scenes themselves say nothing of their sources: the matched filter with the channel has an NMSE of"
            f" {known:.3f}, the constant answer {alone:.3f}, and at the median SNR of {float(scenes.snr_db.median()):g}"
            f" dB all snapshots and antennas together reach {total_snr_db:.0f} dB. Raise task.snr_min_db and"
            " task.snr_max_db.",
            certain=False,
        )
    elif known < (1 - MIN_GAIN) * alone and alone - shown < PART * (alone - known):
        yield Finding(
            "inputs_withhold_answer",
            f"{name} on what the network is shown has an NMSE of {shown:.3f}, the constant answer "
            f"{alone:.3f}, and the matched filter with the channel {known:.3f}.",
            certain=False,
        )


def _equations(scenes: Scenes) -> tuple[int, int, bool]:
    """Of the field on the surface, how many independent ones the antennas give and how many as many others could; and
    whether all of them see the same. How many codes there are is a matter of the design."""
    channel = to_complex(scenes[:EXAMINED].channel).to(torch.complex64)
    most = min(channel.shape[1:])
    if not bool(channel.isfinite().all()):
        return most, most, False
    values = torch.linalg.svdvals(channel)
    rank = int((values > NONE * values[:, :1]).sum(1).median())
    unit = channel / torch.linalg.vector_norm(channel, dim=2, keepdim=True).clamp_min(1e-30)
    return rank, most, bool((torch.linalg.vector_norm(unit - unit[:, :1], dim=2) < SAME).all())


def _worse_than_zero(name: str, factor: Tensor, scenes: Scenes) -> Iterator[Finding]:
    """An estimator that finds the sources of loud scenes and scores above 1, where zero is 1, finds others than the
    target has."""
    loud = scenes.snr_db + 10 * math.log10(scenes.snapshots[0, ..., 0].numel()) > LOUD
    known = loud & factor.flatten(1).isfinite().all(1)
    score, seen = scene_nmse(Prediction(factor), scenes), f"{name} on the network's inputs has an NMSE of"
    if int(known.sum()) < FEWEST or float(score[known].mean()) <= 1.0:
        return
    conjugate = float(scene_nmse(Prediction(conj(factor)), scenes)[known].mean())
    seen = (
        f"{seen} {float(score[known].mean()):.3f} in the {int(known.sum())} scenes that are loud enough, and zero has 1"
    )
    found, target = (to_complex(each[known]) for each in (factor, scenes.factor))
    others = _of_others(found, target) - _of_others(found.conj(), target)  # which is nobody's: what fits by chance
    if conjugate < 0.7:
        yield Finding("conjugation_error", f"{seen}; against the conjugate of the targets it has {conjugate:.3f}.")
    elif others > 0.3:
        yield Finding(
            "shuffled_labels",
            f"{seen}; {_of_others(found, target):.0%} of its estimates are like the target of another scene.",
            certain=others > 0.5,
        )
    else:
        yield Finding("inputs_withhold_answer", f"{seen}: it finds other sources than the targets have.", certain=False)


def _of_others(found: Tensor, target: Tensor) -> float:
    """Share of the estimates that are like another scene's target, complex (B, N, .) each."""
    both = torch.einsum("ank,bnq->abkq", found.conj(), target).abs().square().sum((2, 3))
    sizes = [torch.linalg.matrix_norm(each.mH @ each) for each in (found, target)]
    likeness = both / (sizes[0][:, None] * sizes[1]).clamp_min(1e-30)
    own = torch.arange(len(found), device=likeness.device)
    return float(((likeness.max(1)[0] > 0.7) & (likeness.argmax(1) != own)).float().mean())


CHECKS = {"a classical estimator finds the answer in the inputs": input_information}
