"""The training objective: covariance NMSE through the factors, and the auxiliary terms by name.

Legend: B batch, N RIS elements, Q factor columns, K sources (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.config.schema import ConfigError, Loss, Task, section_of
from ris_fast.config.user_code import load_reference
from ris_fast.kernels.cov_nmse.op import cov_nmse
from ris_fast.models.prediction import Prediction
from ris_fast.physics.array import RISArray
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.real_complex import adjoint_matmul
from ris_fast.physics.scenes import Scenes
from ris_fast.training import loss_terms as terms

TERMS = ("cov", "cov_pred", "orthogonality", "cross", "angle", "range", "chamfer", "subspace", "contrast", "count")
TRUTH_TERMS = ("cov", "cov_pred", "subspace", "contrast")  # the ones that tell the factors what the truth is
MODEL_NEEDS = {
    "angle": ("azimuth", "elevation"),
    "range": ("range_m",),
    "chamfer": ("azimuth", "elevation"),
    "count": ("count_logits",),
}
SCENE_NEEDS = {
    "angle": ("azimuth", "elevation"),
    "range": ("range_m",),
    "chamfer": ("azimuth", "elevation"),
    "subspace": ("factor",),
    "contrast": ("factor",),
}
MOST_MATCHED = 7
OWN_TERM = "a function of (prediction, scenes) that returns one number a scene"


class CovarianceLoss(nn.Module):
    """Weighted sum of named terms; a term of weight zero is not computed.

    Model: lam_cov NMSE(R_blend) + lam_cov_pred NMSE(R_pred) + auxiliary terms, every term a mean over the scenes.
    Args: weights: the section [loss] of a configuration, its defaults if none is given; task: RIS-12x12 if none is;
        own: one more term, (Prediction, Scenes) -> (B,) or 0-d, with the weight loss.own_weight; by default the one
            that loss.own names. docs/own-network.md is its contract.
    Raises: ConfigError (a ValueError) if no weight tells the covariance factors what the truth is, or a section is of
        another kind, or the own term cannot be used.
    Numerics: always float32 or wider, whatever autocast says.
    """

    def __init__(
        self, weights: Loss | None = None, task: Task | None = None, own: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        self.settings = Loss() if weights is None else section_of("CovarianceLoss", "weights", weights, Loss)
        task = Task() if task is None else section_of("CovarianceLoss", "task", task, Task)
        self.sources = task.max_sources
        self.weights = {name: getattr(self.settings, name) for name in TERMS if getattr(self.settings, name) > 0.0}
        self.own, self.own_name = own_term(self.settings.own, own)
        if self.own is not None and self.settings.own_weight > 0.0:
            self.weights[self.own_name] = self.settings.own_weight
        _check(self.weights, task, self.own_name)
        if {"angle", "range"} & self.weights.keys():
            slots, table = terms.assignments(task.max_sources)
            self.register_buffer("slots", slots, persistent=False)
            self.register_buffer("table", table, persistent=False)
        self.register_buffer("ramp", terms.stencil(*RISArray.of(task).shares()), persistent=False)

    def forward(self, prediction: Prediction, scenes: Scenes) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total (0-d) and every enabled term before its weight (0-d each).

        Raises: TypeError where one of them is something else; ValueError naming the term and the output, where the
            model or the scenes lack what a term needs.
        """
        _check_kinds(prediction, scenes)
        self._check_inputs(prediction, scenes)
        prediction = Prediction(*prediction).apply(_wide)
        with torch.autocast(prediction.factor.device.type, enabled=False):
            raw = self._covariance(prediction.factor, scenes) | self._located(prediction, scenes)
            raw |= self._factor_terms(prediction.factor, scenes)
            if "count" in self.weights:
                raw["count"] = terms.count_entropy(prediction.count_logits, scenes.count).mean()
            if self.own_name in self.weights:
                raw[self.own_name] = self.own(prediction, scenes).mean()
            total = torch.stack([self.weights[name] * raw[name] for name in self.weights]).sum()
        return total, {name: raw[name] for name in self.weights}

    def _covariance(self, factor: Tensor, scenes: Scenes) -> dict[str, Tensor]:
        """The NMSE with and without the blend; one number where there is no blend."""
        names = [name for name in ("cov", "cov_pred") if name in self.weights]
        blended = {name: name == "cov" and self.settings.beta > 0.0 for name in names}
        values = {blend: self.nmse(factor, scenes, blend=blend).mean() for blend in set(blended.values())}
        return {name: values[blended[name]] for name in names}

    def nmse(self, factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        """NMSE of the effective covariance, scene by scene: (B,). Training, validation and inference all call this.

        Reads no value, on a CPU either, so that a step is the same everywhere: readers of data look at targets.
        `cov_nmse` itself refuses targets that are no covariances.
        """
        known = {"target_cov": scenes.covariance} if scenes.factor is None else {"target_factor": scenes.factor}
        sample = {"sample_factor": least_squares_factor(scenes), "blend": self.settings.beta} if blend else {}
        return cov_nmse(
            factor,
            **known,
            **sample,
            loading=self.settings.loading,
            shrink=self.settings.shrink,
            snr_db=scenes.snr_db,
            reduction="none",
            validate=False,
        )

    def _located(self, prediction: Prediction, scenes: Scenes) -> dict[str, Tensor]:
        """The terms on angles and ranges; matching and distances are shared."""
        wanted = self.weights.keys() & {"angle", "range", "chamfer"}
        if not wanted:
            return {}
        active = self._active(scenes)
        losses: dict[str, Tensor] = {}
        raw: dict[str, Tensor] = {}
        if wanted & {"angle", "chamfer"}:
            angles = terms.angle_gaps(prediction.azimuth, prediction.elevation, scenes.azimuth, scenes.elevation)
            losses["angle"] = terms.huber(angles, terms.ANGLE_DELTA).sum(-1)
        if "range" in wanted:
            ranges = terms.log_range_gaps(prediction.range_m, scenes.range_m, active)
            losses["range"] = terms.huber(ranges, terms.RANGE_DELTA)
        if wanted & {"angle", "range"}:
            slots = terms.match(terms.assignment_cost(losses), active, self.slots, self.table)
            raw = {name: terms.matched(losses[name], slots, active).mean() for name in losses if name in wanted}
        if "chamfer" in wanted:
            raw["chamfer"] = terms.chamfer(angles, active).mean()
        return raw

    def _factor_terms(self, factor: Tensor, scenes: Scenes) -> dict[str, Tensor]:
        """The terms that act on the factors alone; the factor's Gram matrix and the true directions are shared."""
        factor = terms.in_scale(factor)
        gram = terms.gram(factor) if self.weights.keys() & {"orthogonality", "cross", "subspace"} else None
        steer = terms.unit_columns(scenes.factor) if self.weights.keys() & {"subspace", "contrast"} else None
        wanted: dict[str, Callable[[], Tensor]] = {
            "orthogonality": lambda: terms.orthogonality(gram),
            "cross": lambda: terms.cross(gram),
            "subspace": lambda: terms.subspace(gram, adjoint_matmul(steer, factor), terms.gram(steer)),
            "contrast": lambda: terms.contrast(factor, steer, self.ramp, self._active(scenes)),
        }
        return {name: term().mean() for name, term in wanted.items() if name in self.weights}

    def _active(self, scenes: Scenes) -> Tensor:
        return terms.active_sources(scenes.count, self.sources)

    def _check_inputs(self, prediction: Prediction, scenes: Scenes) -> None:
        for name in self.weights:
            for owner, thing, needs in (("the model", prediction, MODEL_NEEDS), ("the scenes", scenes, SCENE_NEEDS)):
                missing = [key for key in needs.get(name, ()) if getattr(thing, key) is None]
                if missing:
                    raise ValueError(
                        f"CovarianceLoss: loss.{name} = {self.weights[name]} needs {', '.join(missing)}, "
                        f"which {owner} did not give. Set loss.{name} = 0, or use one that has it."
                    )
        if "cross" in self.weights and prediction.factor.shape[2] % 2:
            raise ValueError(
                "CovarianceLoss: loss.cross compares two halves of the factor, which has "
                f"{prediction.factor.shape[2]} columns. Set loss.cross = 0, or return an even number."
            )


def served_by(settings: Loss, lacks: Collection[str]) -> tuple[Loss, list[str]]:
    """The weights without the terms that scenes cannot serve which lack these fields, and a note for each.

    Raises: ConfigError where the blend is asked for and the channel is missing.
    """
    if settings.beta > 0.0 and "channel" in lacks:
        raise ConfigError(
            f"CovarianceLoss: loss.beta = {settings.beta} blends a sample covariance, which needs the channel H; the "
            "files carry none. Set loss.beta = 0, or use data with H_full."
        )
    lost = {
        name: needed
        for name, needs in SCENE_NEEDS.items()
        if getattr(settings, name) > 0.0 and (needed := [each for each in needs if each in lacks])
    }
    notes = [
        f"loss.{name} = {getattr(settings, name)} is left out: it needs the true {', '.join(needed)}, which the scenes"
        " do not have"
        for name, needed in lost.items()
    ]
    return replace(settings, **dict.fromkeys(lost, 0.0)), notes


def _check_kinds(prediction: Prediction, scenes: Scenes) -> None:
    if isinstance(prediction, Scenes) and not isinstance(scenes, Scenes):
        raise TypeError(
            "CovarianceLoss: the scenes came first and the prediction second. Pass loss(prediction, scenes)."
        )
    if not isinstance(prediction, tuple) or not hasattr(prediction, "factor"):
        raise TypeError(
            f"CovarianceLoss: prediction is a {type(prediction).__name__}, expected a Prediction. "
            "Pass what the network returns, or ris_fast.models.Prediction(factor)."
        )
    if not isinstance(scenes, Scenes):
        raise TypeError(
            f"CovarianceLoss: scenes is a {type(scenes).__name__}, expected Scenes. For a bare target use"
            " ris_fast.cov_nmse."
        )


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def own_term(setting: str, given: Callable[..., Tensor] | None) -> tuple[Callable[..., Tensor] | None, str]:
    """The term of the user's own, given or named by loss.own, and what reports call it; (None, '') where there is none.

    Raises: ConfigError.
    """
    if given is None and not setting:
        return None, ""
    term = load_reference("loss.own", setting, OWN_TERM) if given is None else given
    if not callable(term):
        raise ConfigError(f"CovarianceLoss: own is a {type(term).__name__}; expected {OWN_TERM}.")
    if isinstance(term, nn.Module) and any(each.requires_grad for each in term.parameters()):
        raise ConfigError(
            "CovarianceLoss: own has parameters, which no optimizer would train. Make them part of the network, or"
            " freeze them."
        )
    name = getattr(term, "__name__", type(term).__name__)
    if name in TERMS or not name.isidentifier():
        raise ConfigError(
            f"CovarianceLoss: the own term is called '{name}', which reports cannot tell from the others. Give the"
            " function a name of its own."
        )
    return term, name


def _check(weights: dict[str, float], task: Task, own: str) -> None:
    if not {*TRUTH_TERMS, own} & set(weights):
        raise ConfigError(
            f"CovarianceLoss: {', '.join(f'loss.{name} = 0' for name in TRUTH_TERMS)}: no term tells the "
            "covariance factors what the truth is, so they would not learn. Set loss.cov above zero; to 1e-3 where"
            " a network makes its factors of the positions that it answers."
        )
    matched = [f"loss.{name}" for name in ("angle", "range") if name in weights]
    if matched and task.max_sources > MOST_MATCHED:
        raise ConfigError(
            f"CovarianceLoss: {' and '.join(matched)} tries all K! assignments, so task.max_sources = "
            f"{task.max_sources} is too many; at most {MOST_MATCHED}. Use loss.chamfer instead."
        )
