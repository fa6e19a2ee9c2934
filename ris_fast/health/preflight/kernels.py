"""Preflight of the kernels: on the run's own scenes and weights they give the numbers of their plain definitions.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.kernels.cov_nmse import reference
from ris_fast.kernels.field.op import aperture_field
from ris_fast.kernels.field.reference import aperture_field as field_definition
from ris_fast.kernels.pursuit.reference import pursuit_features
from ris_fast.kernels.pursuit.search import Geometry
from ris_fast.kernels.scale import rescaled
from ris_fast.models.beams import FieldPrior
from ris_fast.models.features import PursuitFeatures
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.optim.fused_adamw import FusedAdamW
from ris_fast.training.step import network_inputs

VALUE, GRADIENT, STEP = 1e-4, 1e-3, 1e-3  # relative; float32 against float64 is a hundred times closer
FEATURES, FEW = 1e-2, 8  # of the median scene: two positions of nearly equal score may swap
FIELD_STEPS = 3  # of conjugate gradients: many magnify rounding
FAINT = 1e-3  # noise of 60 dB: with less, rounding alone chooses what a pursuit finds beyond the sources
ROUNDING = 1e-6  # of the weights: a few roundings of float32, however short the way
UNLIKE = 0.01  # of their mean: the spread of weights that are meant
FEW_COUNT = 0.3  # of the scenes, that make the gradient
WEIGHTS = 2048  # of each tensor, in the copy that the optimizer steps on


def loss_kernel(context: PreflightContext) -> Iterator[Finding]:
    """Value and gradient of the covariance NMSE, as the loss calls it, against the dense definition in float64."""
    settings = context.loss.settings
    factor = context.guess.factor.float()
    if not bool(factor.isfinite().all()):
        return
    for blend in {False, settings.beta > 0}:
        (value, slope), (wanted, right) = (
            _with_gradient(call, factor, dtype)
            for call, dtype in (
                (lambda f, blend=blend: context.loss.nmse(f, context.scenes, blend=blend), torch.float32),
                (lambda f, blend=blend: defined(context, f, blend), torch.float64),
            )
        )
        gap = float(((value - wanted).abs() / wanted.abs().clamp_min(1.0)).max())
        turn = float((slope - right).norm() / right.norm().clamp_min(1e-30))
        if not (gap <= VALUE and turn <= GRADIENT):
            own = "nmse" in vars(context.loss) or type(context.loss).nmse is not CovarianceLoss.nmse
            mean = float((value - wanted).mean().abs() / wanted.mean().abs().clamp_min(1.0))
            if own and turn <= GRADIENT and mean <= VALUE:
                context.note = "the loss is that of its definition over the batch, and its values scene by scene not"
                return
            weights = _weights(slope, right)
            if weights is not None and (against := int((weights < -GRADIENT * weights.abs().max()).sum())):
                yield Finding(
                    "loss_sign",
                    f"scene by scene the gradient of the loss{' with the blend' if blend else ''} is a multiple of that"
                    f" of its definition, and in {against} of {len(weights)} scenes a negative one: they are driven"
                    " away from their target. Weights of scenes must not be below zero.",
                    certain=False,
                )
                return
            weighted = None if weights is None else _counting(weights)
            if weights is not None and weighted >= FEW_COUNT and float(weights.std()) > UNLIKE * float(weights.mean()):
                context.note = "scenes are weighted: the gradient of each is its own multiple of its definition's"
                return
            if weighted is not None and weighted < FEW_COUNT:
                yield Finding(
                    "scenes_left_out",
                    "scene by scene the gradient of the loss is a multiple of that of its definition, and another"
                    " multiple in"
                    f" each: as many count as {weighted * len(slope):.1f} of {len(slope)} scenes would with one"
                    " weight for"
                    " all. Where scenes are weighted on purpose, look at how steep the weights are.",
                    certain=False,
                )
            yield Finding(
                "kernel_differs",
                f"the loss{' with the blend' if blend else ''} differs from its definition by {gap:.2g}, its "
                f"gradient by {turn:.2g} (relative; {VALUE:g} and {GRADIENT:g} are allowed).",
                certain=weighted is None and not own,
            )
            return


def _weights(slope: Tensor, right: Tensor) -> Tensor | None:
    """What each scene's gradient is times the right one, (B,); None where it is no multiple.

    Args: both (B, N, Q, 2).
    """
    found, wanted = slope.flatten(1), right.flatten(1)
    weight = (found * wanted).sum(1) / wanted.square().sum(1).clamp_min(1e-300)
    if float((found - weight[:, None] * wanted).norm()) > 10 * GRADIENT * float(found.norm()):
        return None
    return weight if bool(weight.any()) else None


def _counting(weights: Tensor) -> float:
    """The share of scenes that count, with these weights."""
    return float(weights.sum().square() / weights.square().sum()) / len(weights)


def _with_gradient(call: object, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    leaf = factor.to(dtype, copy=True).requires_grad_()
    with torch.enable_grad():
        value = call(leaf)  # type: ignore[operator]
        slope = torch.autograd.grad(value.sum(), leaf)[0]
    return value.detach().double(), slope.double()


def defined(context: PreflightContext, factor: Tensor, blend: bool) -> Tensor:
    """The NMSE of each scene by its dense definition, with the run's blend, loading and shrinkage: (B,)."""
    settings, scenes = context.loss.settings, context.scenes

    def wide(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.double()

    sample = wide(least_squares_factor(scenes)) if blend else None
    return reference.cov_nmse(
        factor,
        wide(scenes.factor),
        None if scenes.factor is not None else wide(scenes.covariance),
        sample,
        wide(scenes.snr_db),
        settings.beta if blend else 0.0,
        settings.loading,
        settings.loading,
        settings.shrink,
    )


# ---- features -------------------------------------------------------------------------------------------------------


def field_kernel(context: PreflightContext) -> Iterator[Finding]:
    """The estimate of the field of a few scenes against its plain form in float64, for a network that has its prior."""
    prior = _first(context, FieldPrior)
    if prior is None or context.scenes.channel is None:
        return
    scenes, static = context.scenes[:FEW], context.config.task.symbols == "static"
    y, channel, codes, snr = network_inputs(scenes)
    given = rescaled(channel.float()), codes.float(), rescaled(y.float()), snr.float()
    found = aperture_field(*given, static=static, root=prior.root, steps=FIELD_STEPS)
    wanted = field_definition(*(each.double() for each in (*given, *prior.root)), static, FIELD_STEPS)
    gap = _median_gap(found, wanted)
    if gap > VALUE:
        yield Finding(
            "kernel_differs", f"the field of the median scene differs from that of its plain form by {gap:.2g}."
        )


def _first(context: PreflightContext, kind: type) -> Any:
    return next((module for module in context.model.modules() if isinstance(module, kind)), None)


def _median_gap(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the median scene."""
    gap = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp_min(1e-30)
    return float(gap.median())


def feature_kernel(context: PreflightContext) -> Iterator[Finding]:
    """The pursuit of a few scenes against its plain form; nothing to compare for a network without one."""
    extract = _first(context, PursuitFeatures)
    if extract is None or context.scenes.channel is None:
        return
    scenes = context.scenes[:FEW]
    y, channel, codes, snr = network_inputs(scenes)
    y = y + FAINT * y.square().mean((1, 2, 3), keepdim=True).sqrt() * torch.randn(
        y.shape, generator=torch.Generator().manual_seed(0)
    ).to(y)
    found = extract(y, channel, codes, snr)
    wanted = pursuit_features(
        y, channel, codes, snr, [getattr(extract, name) for name in Geometry._fields], extract.wavenumber, extract.atoms
    )
    for what, a, b in (("inputs", found.inputs, wanted[0]), ("basis", found.basis, wanted[1])):
        gap = _median_gap(a, b)
        if gap > FEATURES:
            yield Finding(
                "kernel_differs",
                f"the pursuit's {what} of the median scene differ from those of its plain form by {gap:.2g}.",
            )
            return


# ---- optimizer ------------------------------------------------------------------------------------------------------


def step_kernel(context: PreflightContext) -> Iterator[Finding]:
    """Three optimizer steps on a small copy of the weights, one of them with a NaN, against the plain reference."""
    (weights, means), (right, right_means) = (
        _stepped(context, backend) for backend in (context.config.training.backend, "reference")
    )
    first = torch.cat([_piece(parameter).flatten() for parameter in context.parameters.values()])
    way = float((right - first).norm())
    gap = max(float((weights - right).norm()), float((means - right_means).norm()))
    if not gap <= STEP * way + ROUNDING * float(first.norm()):
        yield Finding(
            "kernel_differs",
            f"after three steps on a small copy, in which the plain form of the optimizer goes {way:.3g}, weights "
            f"or their average are off by {gap:.2g}.",
        )


def _piece(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:WEIGHTS].float().clone()


def _stepped(context: PreflightContext, backend: str) -> tuple[Tensor, Tensor]:
    """Weights and averaged weights after three steps of the run's optimizer, built with this backend."""
    settings, own = context.config.optimizer, {id(p): name for name, p in context.parameters.items()}
    groups, copies = [], {}
    for group in context.optimizer.param_groups:
        mine = {
            own[id(p)]: torch.nn.Parameter(_piece(p))
            for p in group["params"]
            if id(p) in own and own[id(p)] not in copies
        }
        copies |= mine
        groups += (
            [
                {
                    "params": list(mine.items()),
                    "lr": group.get("peak_lr", group["lr"]),
                    "weight_decay": group["weight_decay"],
                }
            ]
            if mine
            else []
        )
    optimizer = FusedAdamW(
        groups,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        max_grad_norm=settings.max_grad_norm or None,
        ema_decay=settings.ema_decay or None,
        ema_warmup=True,
        clear_grads=True,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(13)
    for number in range(3):
        for copy in copies.values():
            copy.grad = torch.randn(copy.shape, generator=generator).to(copy)
        if number == 1:
            next(iter(copies.values())).grad[0] = float("nan")
        optimizer.step()
    return _together(context, copies), _averaged(context, optimizer, copies)


def _averaged(context: PreflightContext, optimizer: FusedAdamW, copies: dict[str, Tensor]) -> Tensor:
    if not optimizer.ema_decay:
        return _together(context, copies)
    with optimizer.ema():
        return _together(context, copies)


def _together(context: PreflightContext, copies: dict[str, Tensor]) -> Tensor:
    """In the order of the model; a tensor that no group holds stays as it is."""
    return torch.cat(
        [copies[name].detach().clone() if name in copies else _piece(p) for name, p in context.parameters.items()]
    )


CHECKS = {
    "the loss and its gradient are their definition": loss_kernel,
    "features are their definition": feature_kernel,
    "the estimate of the field is its definition": field_kernel,
    "the optimizer's kernels are their definition": step_kernel,
}
