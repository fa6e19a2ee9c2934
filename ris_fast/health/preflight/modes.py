"""Preflight of training and evaluation mode: which modules are in which, what is random, and what makes the two differ.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.compare_calls import ROUNDED
from ris_fast.health.preflight.follow import parting
from ris_fast.health.preflight.measures import CLOSE, SAME, listed, relative_change
from ris_fast.health.preflight.probe import PreflightContext
from ris_fast.models.modes import eval_mode
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.telemetry.step_telemetry import modules_in_eval_mode

NOISE_SHARE = 0.7  # of the answers' variance that dropout may make
OF_COVARIANCES = 0.6  # of that of their covariances
MOSTLY = 0.7  # dropout, or the relative difference of two answers, that leaves next to nothing of a signal
BATCH_NORM = nn.modules.batchnorm._BatchNorm
SETTLING, SETTLING_SCENES = 40, 64  # batches, 0.9^40 = 1.5 % of the first statistics; scenes of each at most
FOLLOW = 0.7  # of the first statistics at most that are left by then, where the rest of them can be taken out
UNSETTLED = 0.5  # relative difference of the answers; a batch's own statistics make 0.03 to 0.2 with 16 to 64 scenes
UNLIKE = 2.0  # times what dropout makes
EXPLAINS = 0.3  # of the difference, that a module by itself makes
DRAWN = (
    "Look for what draws random numbers in forward, as noise, a mask or a random order, and for how much of the signal"
    " it leaves."
)
DRAWS, FEW_WAYS = 16, 4  # passes of other random numbers; answers that a choice among a few has at most
MOST = 200  # modules that are switched one by one


def randomness(context: PreflightContext) -> Iterator[Finding]:
    """Evaluation mode is not random, training mode not mostly so, and the two agree where there is no dropout."""
    scenes = context.scenes
    first, second = context.answer(scenes, 1), context.answer(scenes, 2)
    evaluation = list(_evaluation(context, scenes, first, second))
    yield from evaluation
    context.model.train()
    in_eval_mode = [name or "the network" for name in modules_in_eval_mode(context.model)]
    if in_eval_mode:
        yield Finding(
            "eval_mode_in_training",
            f"after train(), {len(in_eval_mode)} modules are still in evaluation mode: {listed(in_eval_mode)}.",
            certain=not _kept_by_class(context.model),
        )
    drops = [module for module in context.model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    _training_answer(context, scenes, 1)
    if not in_eval_mode and (in_eval_mode := [name or "the network" for name in modules_in_eval_mode(context.model)]):
        yield Finding(
            "eval_mode_in_training",
            f"train() puts all modules into training mode, and behind one pass {len(in_eval_mode)} are in evaluation"
            " mode:"
            f" {listed(in_eval_mode)}. Something in the forward calls eval() or train(False).",
            certain="the network" in in_eval_mode,
        )
    answers = [_training_answer(context, scenes, seed) for seed in (1, 2)]
    noise = relative_change(answers[0], answers[1])
    spread = float(answers[0].std(0).norm() * len(answers[0]) ** 0.5 / answers[0].norm())
    dropped = max(
        [module.p for module in drops]
        + [
            value
            for module in context.model.modules()
            for name, value in vars(module).items()
            if "dropout" in name and isinstance(value, float)
        ],
        default=0.0,
    )
    loud = noise**2 / 2 > NOISE_SHARE * max(spread, 1e-12) ** 2
    if loud:  # a phase that is drawn anew changes factors, and no covariance
        noise_of_r, spread_of_r = _in_covariances(*answers)
        loud = noise_of_r**2 / 2 > OF_COVARIANCES * max(spread_of_r, 1e-12) ** 2
    if loud and not dropped and (ways := _ways(context, scenes)):
        context.note = f"training mode draws one of {ways} ways to answer, as augmentation does"
        loud = False
    if loud or dropped >= MOSTLY:
        yield Finding(
            "heavy_dropout",
            f"two answers to the same scenes differ by {noise:.0%}, different scenes by {spread:.0%}"
            f"{f'; dropout {dropped:g}' if dropped else '; no layer is a dropout, so something else is drawn'}.",
            advice="" if dropped else DRAWN,
            certain=dropped >= MOSTLY,  # answers of an untrained network may be much alike, and small beside the noise
        )
    elif _reseeds(context, scenes):
        yield Finding(
            "losses_differ",
            "behind a pass in training mode torch's random numbers go on from the same place, whatever they were before"
            " it: something in forward sets the seed. Every pass then draws the same dropout masks and noise, and what"
            " else draws, as the order of scenes may, repeats itself.",
            advice="Take torch.manual_seed out of forward: set it once, before training. Numbers that are to stay the"
            " same belong into a buffer, drawn in __init__, or come from a torch.Generator of their own.",
            certain=False,
        )
    elif relative_change(first, answers[0]) > max(CLOSE, UNLIKE * noise) and not in_eval_mode and not evaluation:
        if not _rounded_in_evaluation(context, scenes, relative_change(first, answers[0])):
            yield from _modes_apart(context, noise)


def _ways(context: PreflightContext, scenes: Scenes) -> int:
    """Among how many answers to each scene training mode chooses by chance, where they are few and each tells scenes
    apart, as of a mirror image that is drawn; 0 where answers are as many as draws, or one says nothing."""
    answers = torch.stack([_training_answer(context, scenes, seed).flatten(1) for seed in range(1, DRAWS + 1)])
    size = answers.square().mean().sqrt()
    ways = 0
    for row in range(answers.shape[1]):
        of_one, different = answers[:, row], []
        for each in of_one:
            if all(float((each - other).square().mean().sqrt()) > SAME * float(size) for other in different):
                different.append(each)
        ways = max(ways, len(different))
    spread = (answers - answers.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
    return ways if ways <= FEW_WAYS and float(spread.min()) > EXPLAINS * float(spread.max()) else 0


def _reseeds(context: PreflightContext, scenes: Scenes) -> bool:
    """Whether a pass in training mode leaves torch's generator at one place, wherever it was."""
    places = []
    for seed in (1, 2):
        _training_answer(context, scenes, seed)
        places.append(torch.get_rng_state())
    return torch.equal(*places)


def _in_covariances(one: Tensor, other: Tensor) -> tuple[float, float]:
    """How far the covariances F F^H of two answers (B, N, Q, 2) are apart, and those of different scenes, relative to
    their size.

    Model: |F F^H - G G^H|^2 = |F^H F|^2 + |G^H G|^2 - 2 |F^H G|^2, without a matrix of N x N.
    """
    f, g = to_complex(one.double()), to_complex(other.double())

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.mH @ b).abs().square().sum((-2, -1))

    own = product(f, f)
    apart = (own + product(g, g) - 2 * product(f, g)).clamp_min(0.0).sum()
    mean = product(f[:, None], f[None]).mean()
    spread = (own.sum() - len(f) * mean).clamp_min(0.0) * len(f) / max(1, len(f) - 1)
    return tuple(float((each / own.sum().clamp_min(1e-60)).sqrt()) for each in (apart, spread))


def _rounded_in_evaluation(context: PreflightContext, scenes: Scenes, apart: float) -> bool:
    """Whether the network itself answers alike in both modes, and what evaluates in its place is off by rounding."""
    if not context.compiled or apart > ROUNDED:
        return False
    with context.as_written():
        return relative_change(context.answer(scenes, 1), _training_answer(context, scenes, 1)) <= CLOSE


def _kept_by_class(model: nn.Module) -> bool:
    """Whether a class of the user's own says which of its parts stay in a mode, as for frozen statistics."""
    return any(
        type(module).train is not nn.Module.train and not type(module).__module__.startswith(("ris_fast.", "torch."))
        for module in (*model.modules(), model.__dict__.get("net", model))
    )


# ---- evaluation mode
# --------------------------------------------------------------------------------------------------


def _evaluation(context: PreflightContext, scenes: Scenes, first: Tensor, second: Tensor) -> Iterator[Finding]:
    """In evaluation mode answers are the same each time; else whether that is chance, a buffer or something kept."""
    again = context.answer(scenes, 1)
    stuck = _still_training(context.model)
    if relative_change(first, again) > SAME:
        yield _kept_from_call_to_call(context, scenes, relative_change(first, again))
    elif relative_change(first, second) > SAME:
        where = parting(context.model, lambda: context.answer(scenes, 1), lambda: context.answer(scenes, 2))
        named = f", beginning in '{where}'" if where else ""
        yield Finding(
            "train_mode_in_validation",
            f"in evaluation mode two answers to the same scenes differ by {relative_change(first, second):.2g}{named}"
            f"{_said(stuck)}: dropout is at work, or something else draws random numbers there."
            " Monte Carlo dropout is made so on purpose.",
            certain="the network" in stuck,
        )
    elif stuck:
        with eval_mode(context.model):
            for module in context.model.modules():
                module.training = False
            quiet = _seeded(context, scenes)
        if relative_change(first, quiet) > CLOSE:
            yield Finding(
                "train_mode_in_validation",
                f"{_said(stuck)[2:]}, and answers change by {relative_change(first, quiet):.2g} where they are not.",
            )


def _still_training(model: nn.Module) -> list[str]:
    """Names of the modules that eval() leaves in training mode."""
    with eval_mode(model):
        return [name or "the network" for name, module in model.named_modules() if module.training]


def _said(stuck: list[str]) -> str:
    return f"; after eval() {len(stuck)} modules are still in training mode: {listed(stuck)}" if stuck else ""


@torch.no_grad()
def _seeded(context: PreflightContext, scenes: Scenes) -> Tensor:
    """An answer in the modes as they are, with all common generators at the same place."""
    torch.manual_seed(1)
    random.seed(1)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1)
    return context.step.predict(scenes).factor.float().clone()


def _kept_from_call_to_call(context: PreflightContext, scenes: Scenes, change: float) -> Finding:
    """Two calls with torch's generator at the same place differ: another generator, a buffer, or a state."""
    with eval_mode(context.model):
        before = {name: value.clone() for name, value in context.model.named_buffers()}
        answers = [_seeded(context, scenes)]
        _seeded(context, scenes[: max(1, scenes.batch - 1)])  # else what is kept may have settled
        answers.append(_seeded(context, scenes))
        changed = [
            name
            for name, value in context.model.named_buffers()
            if not torch.allclose(value, before[name], 0.0, 0.0, equal_nan=True)
        ]
        where = parting(context.model, lambda: _seeded(context, scenes), lambda: _seeded(context, scenes))
    named = f", beginning in '{where}'" if where else ""
    seen = f"in evaluation mode two calls with the same scenes differ by {change:.2g}{named}"
    if changed:
        return Finding("unsettled_buffers", f"{seen}; evaluation changes the buffers {listed(changed)}.")
    if relative_change(*answers) <= SAME:
        return Finding(
            "train_mode_in_validation",
            f"{seen}, and do not where Python's and numpy's random numbers are set as well: something draws from them.",
        )
    return Finding(
        "train_mode_in_validation",
        f"{seen}, with all common random numbers set to the same: a random generator of its own, or a state that is"
        " kept from one call to the next and is no buffer, such as a counter or a cache.",
        advice="Print what this module reads besides its input in two calls: a generator's state has changed where it"
        " draws (then call it in training only), an attribute where it remembers (then leave it out of evaluation).",
    )


# ---- training beside evaluation
# ---------------------------------------------------------------------------------------


def _modes_apart(context: PreflightContext, noise: float) -> Iterator[Finding]:
    """Training and evaluation mode still answer differently once running statistics, if there are any, had the time to
    follow: those of an untrained network say nothing. Then which module makes the difference."""
    before = [each.clone() for each in context.model.buffers()]
    groups = [scenes[:SETTLING_SCENES] for group in context.groups for scenes in group if scenes.batch > 1]
    groups = groups or [context.scenes]
    for number in range(SETTLING):
        with torch.no_grad():
            context.step.predict(groups[number % len(groups)])
    running = any(not torch.equal(old, new) for old, new in zip(before, context.model.buffers()))
    _forget_the_first(context.model, dict(zip(map(id, context.model.buffers()), before)))
    scenes = groups[0]
    settled = context.answer(scenes, 1)
    apart = relative_change(settled, _trained_again(context, scenes))
    if apart <= max(UNLIKE * noise, UNSETTLED if running else CLOSE):
        return
    after = f" after {SETTLING} batches in training mode" if running else ""
    seen = f"training and evaluation mode answer differently ({apart:.2g}{after})"
    makers = {name: change for name, change in _switched(context, scenes, settled).items() if change > EXPLAINS * apart}
    names = sorted(makers, key=lambda name: -makers[name])
    shown = ", ".join(f"'{name or 'the network itself'}' by {makers[name]:.2g}" for name in names[:2])
    modules = dict(context.model.named_modules())
    if names and _has_statistics(modules[names[0]]):
        yield Finding("batchnorm_statistics", f"{seen}; of the modules switched one by one, {shown} alone.")
        return
    norms = [name for name, each in modules.items() if isinstance(each, BATCH_NORM)]
    if norms and not names:
        yield Finding("batchnorm_statistics", f"{seen}: {listed(norms)}.", certain=False)
        return
    yield Finding(
        "losses_differ",
        f"{seen}; {f'switched alone, {shown}' if names else 'no module alone makes the difference'}. It has neither"
        " dropout nor running statistics that explain it: it computes something else in training. Where that is meant,"
        " as sampling that evaluation leaves out, it does no harm.",
        advice="Read what the module does where self.training is true. If a scale or a branch is missing in evaluation,"
        " add it; if evaluation is right, remove it from training. Two runs tell: the loss of one batch in both modes"
        " with that branch switched off.",
        certain=False,
    )


@torch.no_grad()
def _forget_the_first(model: nn.Module, first: dict[int, Tensor]) -> None:
    """Takes what is left of their first values out of the running statistics of torch's batch normalisation.

    A first variance of one hides that of a small signal for longer than it takes the statistics to follow a large one.
    Model: n batches leave running = r first + (1 - r) seen, r = (1 - momentum)^n. Args: first: by the buffer's id.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORM) and module.running_mean is not None and module.momentum is not None:
            left = (1.0 - module.momentum) ** int(module.num_batches_tracked - first[id(module.num_batches_tracked)])
            if 0.0 < left < FOLLOW:
                for running in (module.running_mean, module.running_var):
                    running.sub_(left * first[id(running)]).div_(1.0 - left)
                module.running_var.clamp_(min=0.0)


def _switched(context: PreflightContext, scenes: Scenes, settled: Tensor) -> dict[str, float]:
    """By how much the answer of evaluation mode changes with each module by itself in training mode."""
    found = {}
    with eval_mode(context.model):
        for name, module in list(context.model.named_modules())[:MOST]:
            module.training = True
            torch.manual_seed(1)
            with torch.no_grad():
                found[name] = relative_change(settled, context.step.predict(scenes).factor.float())
            module.training = False
    return found


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORM) or any("running" in name for name in module._buffers)


def _trained_again(context: PreflightContext, scenes: Scenes) -> Tensor:
    context.model.train()
    return _training_answer(context, scenes, 1)


def _training_answer(context: PreflightContext, scenes: Scenes, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.enable_grad():
        return context.step.predict(scenes).factor.detach().float().clone()


CHECKS = {"dropout and modes": randomness}
