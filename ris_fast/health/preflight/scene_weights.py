"""Preflight of the weights of scenes: how much of the loss's gradient each has beside that of its plain NMSE.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.distributions import labels_and_sizes, ranks
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.health.preflight.scenes import all_scenes
from ris_fast.health.preflight.truth import COVARIANCE
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.models.prediction import Prediction
from ris_fast.physics.scenes import Scenes

SCENES, FEWEST = 256, 16
ALONG = 0.9  # cosine of the two gradients of a scene: the loss is its NMSE, times a weight
HALF = 0.05  # share of all weight that half of the scenes have together: 0.5 where weights are equal
OTHER_HALF = 0.01  # the same of a loss that is no NMSE, times a weight
TELLS = 0.7  # rank correlation of the weights with a quantity


def scene_weights(context: PreflightContext) -> Iterator[Finding]:
    """No half of the scenes has next to nothing to say."""
    scenes = all_scenes(context)[:SCENES]
    if scenes.batch < FEWEST or (scenes.factor is None and scenes.covariance is None):
        return
    with torch.no_grad():
        guess = context.predict(scenes)
    weights, least = _weights(context, guess, scenes)
    if weights is None:
        return
    order = weights.sort()[0]
    half = float(order[: len(order) // 2].sum() / order.sum())
    context.note = f"half of the scenes have {half:.0%} of the weight"
    if half > least:
        return
    largest = float(order[-max(1, len(order) // 10) :].sum() / order.sum())
    yield Finding(
        "scenes_left_out",
        f"half of {scenes.batch} scenes have {half:.1%} of the weight in the loss together, and a tenth of them"
        f" {largest:.0%}: beside the gradient of its own NMSE the loss's is {float(order[0]):.2g} to"
        f" {float(order[-1]):.2g} times as large, scene by scene.{_goes_with(weights, scenes)} The network learns from"
        " few scenes.",
        advice="Weigh scenes within a factor of ten of each other: clamp the weights, or take their root or logarithm."
        " To test it: train with equal weights, and compare the NMSE of the scenes that have the least.",
        certain=False,
    )


def _weights(context: PreflightContext, guess: Prediction, scenes: Scenes) -> tuple[Tensor | None, float]:
    """The weight of each scene in the loss of its factor, (B,), of mean 1, and the least share of all that half of them
    should have; None where the loss says nothing of some, or blends what it compares.
    """
    settings, given = context.config.loss, guess.factor.float().clone().requires_grad_()
    if settings.beta > 0.0 and context.loss.weights.get("cov", 0.0) > 0:
        return None, 0.0
    known = {"target_cov": scenes.covariance} if scenes.factor is None else {"target_factor": scenes.factor}
    plain = cov_nmse(
        given,
        **known,
        loading=settings.loading,
        shrink=settings.shrink,
        snr_db=scenes.snr_db,
        reduction="none",
        validate=False,
    )
    terms = context.loss(guess._replace(factor=given), scenes)[1]
    names = (*COVARIANCE, getattr(context.loss, "own_name", ""))
    told = [context.loss.weights[name] * terms[name] for name in names if name in terms and terms[name].requires_grad]
    if not told:
        return None, 0.0
    (found,) = torch.autograd.grad(sum(told), given, allow_unused=True)
    (own,) = torch.autograd.grad(plain.sum(), given)
    if found is None or not bool(found.isfinite().all()) or not bool(own.isfinite().all()):
        return None, 0.0
    a, b = own.flatten(1).double(), found.flatten(1).double()
    sizes = a.norm(dim=1), b.norm(dim=1)
    if not float(sizes[0].min()) > 1e-6 * float(sizes[0].max()) or not bool(sizes[1].all()):
        return None, 0.0
    alike = (a * b).sum(1) / (sizes[0] * sizes[1])
    weights = sizes[1] / sizes[0]
    return weights / weights.mean(), HALF if float((alike > ALONG).float().mean()) >= ALONG else OTHER_HALF


def _goes_with(weights: Tensor, scenes: Scenes) -> str:
    """The quantity that the weights follow, in words."""
    found = {
        name: float(torch.corrcoef(torch.stack((ranks(weights.cpu()), ranks(value.cpu()))))[0, 1])
        for name, value in labels_and_sizes(scenes).items()
        if bool(value.isfinite().all()) and float(value.std()) > 0
    }
    name = max(found, key=lambda each: abs(found[each]), default="")
    if not name or abs(found[name]) < TELLS:
        return ""
    return f" The weights {'rise' if found[name] > 0 else 'fall'} with the {name}."


CHECKS = {"scenes have weights of one order": scene_weights}
