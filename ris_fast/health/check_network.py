"""Preflight of the network: what it sees, whether that can carry the answer, and whether it answers with it.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Iterator

import torch
from torch import Tensor, nn

from ris_fast.health.check_parameters import listed
from ris_fast.health.finding import Finding
from ris_fast.health.subject import SMALL, Subject, captured
from ris_fast.physics.pairs import adjoint_matmul, expi, multiply, to_complex, to_pairs
from ris_fast.physics.scenes import Scenes

SAME = 1e-5                # relative change of a factor that rounding explains
CLOSE = 1e-3               # between a compiled network and the same network as written
NOISE_SHARE = 0.5          # of the answers' variance that dropout may make
LARGE, SMALL_RMS = 1e3, 1e-3
GAIN = 20.0                # growth of a signal in one layer
AT_THE_ENDS = 0.9


def change(a: Tensor, b: Tensor) -> float:
    """|a - b| relative to |a|, over the batch."""
    return float((a - b).norm() / a.norm().clamp_min(1e-30))


# ---- what was made of it: compiled graphs, replicas ----------------------------------------------------------------------


def same_network(subject: Subject) -> Iterator[Finding]:
    """What the step calls is the network: the same answers now, and after the weights have changed."""
    if not subject.compiled and not _patched(subject):
        return
    scenes = subject.groups[0][0] if subject.by_torch else subject.scenes
    modes = [(module, module.training) for module in subject.model.modules()]
    for training in (False, True):
        subject.model.train(training)
        for grad in ((True, False) if not training else (True,)):
            with torch.set_grad_enabled(grad):
                finding = _compare(subject, scenes, grad)
            if finding is not None:
                break
        if finding is not None or not any(isinstance(m, nn.Dropout) and m.p for m in subject.model.modules()):
            break
    for module, mode in modes:
        module.training = mode
    if finding is not None:
        yield finding


def _patched(subject: Subject) -> bool:
    return "predict" in subject.step.__dict__


def _compare(subject: Subject, scenes: Scenes, grad: bool) -> Finding | None:
    if subject.model.training:
        return _compare_modes(subject, scenes)
    answers = [_network(subject, scenes) for _ in range(4)]
    if max(change(answers[0], other) for other in answers) > CLOSE:
        return Finding("ranks_diverged", f"four calls of the step's network on the same scenes differ by "
                       f"{max(change(answers[0], other) for other in answers):.2g}: they do not use the same weights.")
    now = change(_eager(subject, scenes), answers[0])
    weights = [parameter for parameter in subject.parameters.values()]
    directions = [torch.randn_like(weight) * (float(weight.detach().square().mean().sqrt()) or 0.1) for weight in weights]
    with subject.moved(weights, directions, 0.3):
        moved, wanted = _network(subject, scenes), _eager(subject, scenes)
    later, stuck = change(wanted, moved), change(answers[0], moved)
    how = "while training" if grad else "in validation"
    if later > max(CLOSE, 2 * now) and stuck < SAME and not grad and _follows(subject, weights, directions):
        return Finding("cached_validation", f"{how}, the network's answers to scenes that it has seen are the same, bit for bit, after "
                       f"its weights were changed; those to other scenes are not.")
    if later > max(CLOSE, 2 * now) and (stuck < SAME or later > 0.1 * change(wanted, _eager(subject, scenes))):
        return Finding("stale_compiled_graph", f"{how}, what the step calls does not follow the network's weights: after they "
                       f"were changed its answers are off by {later:.2g} (before: {now:.2g}).")
    if now > _tolerance(subject):
        return Finding("compiled_differs", f"{how}, what the step calls answers otherwise than the network as written, "
                       f"relative difference {now:.2g}.")
    return None


def _follows(subject: Subject, weights: list[nn.Parameter], directions: list[Tensor]) -> bool:
    """Whether scenes that were not asked for before are answered with the weights as they are."""
    with subject.moved(weights, directions, 0.3):
        fresh = subject.groups[1][0] if subject.by_torch else subject.groups[1][0][:SMALL]
        return change(_eager(subject, fresh), _network(subject, fresh)) < CLOSE


def _tolerance(subject: Subject) -> float:
    return CLOSE if subject.config.training.precision == "fp32" else 0.05


def _compare_modes(subject: Subject, scenes: Scenes) -> Finding | None:
    """A network with dropout is random in training; what the step calls must be as well."""
    def noise(call: object) -> float:
        answers = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            answers.append(call(subject, scenes))  # type: ignore[operator]
        return change(*answers)
    eager, called = noise(_eager), noise(_network)
    if eager > 10 * SAME and called < SAME:
        return Finding("eval_mode_in_training", "in training the network's dropout is at work, and what the step calls answers "
                       "as in evaluation mode: it was compiled or copied in evaluation mode.")
    return None


def _network(subject: Subject, scenes: Scenes) -> Tensor:
    torch.manual_seed(torch.initial_seed() % 2**31)
    return subject.step.predict(scenes).factor.detach().float().clone()


def _eager(subject: Subject, scenes: Scenes) -> Tensor:
    network = subject.step.network
    subject.step.network = subject.model
    try:
        return type(subject.step).predict(subject.step, scenes).factor.detach().float().clone()
    finally:
        subject.step.network = network


# ---- what comes in ---------------------------------------------------------------------------------------------------


def boundary(subject: Subject, scenes: Scenes, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of layers that depend on no weight: what the trainable part sees. Name of the layer -> (B, F)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        first = next((each for each in inputs if isinstance(each, Tensor)), None)
        if first is not None and not first.requires_grad and first.dim() > 1 and first.shape[0] == scenes.batch:
            found.setdefault(name, first.detach().float().flatten(1))
    with captured(subject.model, keep), torch.enable_grad():
        subject.answer_with_grad(scenes, seed)
    return found


def reads_scenes(subject: Subject) -> Iterator[Finding]:
    """The answer depends on the scene, and each scene's answer on that scene alone."""
    scenes = subject.scenes
    answer = subject.answer(scenes)
    seen = boundary(subject, scenes)
    if not bool(answer.isfinite().all()):
        return
    if change(answer, answer[:1].expand_as(answer)) < SAME:
        same = seen and all(change(value, value[:1].expand_as(value)) < SAME for value in seen.values())
        raw = scenes.snapshots.flatten(1)
        if change(raw, raw[:1].expand_as(raw)) < SAME:
            yield Finding("constant_input", f"all of {scenes.batch} scenes have the same snapshots.")
        else:
            yield Finding("ignored_input", f"{scenes.batch} different scenes get the same factor"
                          f"{'; the first layers see the same numbers for all of them' if same else ''}.")
        return
    alone = subject.answer(scenes[: scenes.batch // 2])
    mixed = change(answer[: scenes.batch // 2], alone)
    if mixed > (CLOSE if subject.config.training.precision == "fp32" else 0.1):
        yield Finding("scenes_mixed", f"answers change by {mixed:.2g} when other scenes of the batch are left out.")


def scale(subject: Subject) -> Iterator[Finding]:
    """First layers see numbers of order one, and the unit of the snapshots does not matter."""
    scenes = subject.scenes
    base, seen = subject.answer(scenes), boundary(subject, scenes)
    sizes = {name: float(value.square().mean().sqrt()) for name, value in seen.items()}
    tiny = {name: size for name, size in sizes.items() if 0 < size < SMALL_RMS}
    larger = boundary(subject, replace(scenes, snapshots=1e4 * scenes.snapshots)) if bool(base.isfinite().all()) else {}
    if larger and any(_swallowed(seen[name], larger.get(name)) for name in seen):
        name = next(name for name in seen if _swallowed(seen[name], larger.get(name)))
        yield Finding("epsilon_swallows_signal", f"the input of {name} has rms {sizes[name]:.2g}, and "
                      f"{float(larger[name].square().mean().sqrt()):.2g} for snapshots ten thousand times larger: a constant in "
                      f"the normalisation is larger than the signal.")
        return
    if tiny:
        name = min(tiny, key=tiny.__getitem__)
        yield Finding("input_scale", f"the input of {name} has rms {tiny[name]:.2g}; layers expect numbers of order one.")
        return
    for name, value in seen.items():
        each = value.square().mean(1).sqrt()
        if sizes[name] > LARGE or float(each.max()) > 1e3 * float(each.median().clamp_min(1e-30)):
            yield Finding("input_scale", f"the input of {name} has rms {sizes[name]:.2g}, from {float(each.min()):.2g} to "
                          f"{float(each.max()):.2g} between scenes.")
            return
    other = change(base, subject.answer(replace(scenes, snapshots=100.0 * scenes.snapshots)))
    if other > 0.05:
        yield Finding("input_scale", f"snapshots in another unit (a hundred times larger) change the factors by {other:.2g}: "
                      f"nothing normalises them.")


def _swallowed(now: Tensor, larger: Tensor | None) -> bool:
    """Small now and of order one when the scene is louder: neither normalised nor left alone."""
    if larger is None or not bool(now.any()):
        return False
    a, b = float(now.square().mean().sqrt()), float(larger.square().mean().sqrt())
    return b > 3 * a and b < 3e3 * a


# ---- can it carry the answer? ------------------------------------------------------------------------------------------


def information(subject: Subject) -> Iterator[Finding]:
    """The answer changes when something is taken away that the target cannot be known without."""
    scenes = subject.scenes
    base = subject.answer(scenes)
    if change(base, base[:1].expand_as(base)) < SAME or not bool(base.isfinite().all()):
        return
    if scenes.channel is None:
        yield Finding("inputs_withhold_answer", "the scenes carry no channel H, only H c_l, and the network cannot see what the "
                      "surface did to the field.")
        return
    for what, other in _without(subject, scenes):
        if other is not None and change(base, subject.answer(other)) < SAME:
            yield Finding("inputs_withhold_answer", f"{what} and the factors stay the same to {SAME:g}: the network does not see "
                          f"what the target is made of.")
            return
    yield from _pairing(subject, scenes)


def _without(subject: Subject, scenes: Scenes) -> Iterator[tuple[str, Scenes | None]]:
    """Scenes with one thing destroyed that the answer needs."""
    generator = torch.Generator().manual_seed(2)

    def phases(value: Tensor) -> Tensor:
        return multiply(value, expi(6.2832 * torch.rand(value.shape[:-1], generator=generator)).to(value))
    yield "the phases of the snapshots are drawn anew", replace(scenes, snapshots=phases(scenes.snapshots))
    yield "the channel is that of another scene", replace(scenes, channel=scenes.channel.roll(1, 0), collapsed=None)
    yield "the phases of the channel are drawn anew", replace(scenes, channel=phases(scenes.channel))
    yield "the channel is changed where H c_l cannot show it", hidden_change(scenes)


def hidden_change(scenes: Scenes) -> Scenes | None:
    """Another channel with the same products H c_l; None where the codes span the surface and there is none."""
    codes = to_complex(scenes.codes)
    elements = codes.shape[1]
    _, values, rows = torch.linalg.svd(codes.to(torch.complex128), full_matrices=True)
    rank = int((values > 1e-6 * values.max()).sum())
    if rank >= elements:
        return None
    kernel = rows[rank:].conj()                                         # (N - rank, N), each row v with C v = 0
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(*scenes.channel.shape[:2], kernel.shape[0], dtype=torch.complex128, generator=generator)
    extra = mix.to(kernel.device) @ kernel
    size = to_complex(scenes.channel).abs().square().mean().sqrt() / extra.abs().square().mean().sqrt()
    return replace(scenes, channel=scenes.channel + to_pairs((extra * size).to(torch.complex64)), collapsed=None)


def _pairing(subject: Subject, scenes: Scenes) -> Iterator[Finding]:
    """What a first layer makes of snapshots and channel together is H^H y, which a common phase leaves alone, not H^T y."""
    turn = expi(torch.linspace(0.3, 2.8, scenes.batch)).to(scenes.snapshots)[:, None, None]
    back = turn * torch.tensor((1.0, -1.0)).to(turn)
    seen = boundary(subject, scenes)
    right = boundary(subject, replace(scenes, channel=multiply(scenes.channel, turn), snapshots=multiply(scenes.snapshots, turn)))
    wrong = boundary(subject, replace(scenes, channel=multiply(scenes.channel, turn), snapshots=multiply(scenes.snapshots, back)))
    for name, value in seen.items():
        if change(value, wrong[name]) < CLOSE < 0.05 < change(value, right[name]):
            yield Finding("conjugation_error", f"the input of {name} does not change when channel and snapshots turn in opposite "
                          f"directions, and does when they turn together: it is made of H^T y where H^H y belongs.")
            return


# ---- what comes out ----------------------------------------------------------------------------------------------------


def randomness(subject: Subject) -> Iterator[Finding]:
    """Evaluation mode is not random, training mode not mostly so, and the two agree where there is no dropout."""
    scenes = subject.scenes
    first, second = subject.answer(scenes, 1), subject.answer(scenes, 2)
    if change(first, second) > SAME:
        yield Finding("train_mode_in_validation", f"in evaluation mode two answers to the same scenes differ by "
                      f"{change(first, second):.2g}: dropout is at work.")
    subject.model.train()
    asleep = [name or "the network" for name, module in subject.model.named_modules() if not module.training]
    if asleep:
        yield Finding("eval_mode_in_training", f"after train(), {len(asleep)} modules are still in evaluation mode: {listed(asleep)}.")
    norms = [name for name, module in subject.model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    drops = [module for module in subject.model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    answers = [_training_answer(subject, scenes, seed) for seed in (1, 2)]
    noise = change(answers[0], answers[1])
    spread = float(answers[0].std(0).norm() * len(answers[0]) ** 0.5 / answers[0].norm())
    dropped = max([module.p for module in drops] + [value for module in subject.model.modules()
                  for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)], default=0.0)
    if noise**2 / 2 > NOISE_SHARE * max(spread, 1e-12) ** 2 or dropped >= 0.7:
        yield Finding("heavy_dropout", f"two answers to the same scenes differ by {noise:.0%}, different scenes by {spread:.0%}"
                      f"{f'; dropout {dropped:g}' if dropped else ''}.")
    elif norms or (noise < SAME and change(first, answers[0]) > CLOSE and not asleep):
        yield Finding("batchnorm_statistics", f"without dropout, training and evaluation mode answer differently "
                      f"({change(first, answers[0]):.2g}){f': {listed(norms)}' if norms else ''}.")


def _training_answer(subject: Subject, scenes: Scenes, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.enable_grad():
        return subject.step.predict(scenes).factor.detach().float().clone()


def saturation(subject: Subject) -> Iterator[Finding]:
    """Factors are not all at the ends of a range, and have as many independent columns as scenes have sources."""
    answer = subject.answer(subject.scenes)
    if not bool(answer.isfinite().all()):
        return
    low, high = answer.amin(), answer.amax()
    reach = float((high - low).clamp_min(1e-30))
    share = float((((high - answer) < 1e-3 * reach) | ((answer - low) < 1e-3 * reach)).float().mean())
    if share > AT_THE_ENDS and reach > 1e-20:
        yield Finding("saturated_output", f"{share:.0%} of the factor's entries are at {float(low):.3g} or {float(high):.3g}.")
        return
    gram = torch.linalg.eigvalsh(to_complex(adjoint_matmul(answer, answer)))
    needed = min(int(subject.scenes.count.max()), answer.shape[1])
    rank = int((gram > 1e-6 * gram[:, -1:].clamp_min(1e-30)).sum(1).max())
    if rank < needed:
        yield Finding("output_rank_too_low", f"factors have {rank} independent columns of {answer.shape[2]}; scenes have up to "
                      f"{needed} sources.")


def layers(subject: Subject) -> Iterator[Finding]:
    """Signals neither explode nor stop on their way; units differ from each other."""
    signals: dict[str, tuple[float, float, bool]] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            signals.setdefault(name, (_rms(inputs[0]), _rms(output), bool(inputs[0].isfinite().all())))
            if output.requires_grad:
                outputs.setdefault(name, output)
    subject.model.train()
    with captured(subject.model, keep):
        total = subject.run()[0]
    for name, (before, after, finite) in signals.items():
        if finite and not after < float("inf"):
            yield Finding("fp16_overflow", f"{name} answers with values that are not finite to inputs that are.")
            return
    if not bool(total.isfinite()):
        yield Finding("fp16_overflow", f"the loss is {float(total.detach())} although every layer is finite.")
        return
    yield from _exploding(signals)
    yield from _dead(subject, total, outputs, signals)
    yield from _equal_units(subject)


def _rms(value: Tensor) -> float:
    return float(value.detach().float().square().mean().sqrt())


def _exploding(signals: dict[str, tuple[float, float, bool]]) -> Iterator[Finding]:
    grown = {name: after / before for name, (before, after, _) in signals.items() if before > 0}
    if not grown:
        return
    worst = max(grown, key=grown.__getitem__)
    if grown[worst] > GAIN and signals[worst][1] > GAIN:
        yield Finding("bad_initialisation", f"{worst} turns a signal of rms {signals[worst][0]:.2g} into one of "
                      f"{signals[worst][1]:.2g}.")


def _dead(subject: Subject, total: Tensor, outputs: dict[str, Tensor], signals: dict) -> Iterator[Finding]:
    """Layers whose output receives no gradient for any unit and scene, although it is there and autograd reaches it."""
    if not total.requires_grad or total.grad_fn is None or not outputs:
        return
    gradients = torch.autograd.grad(total, list(outputs.values()), retain_graph=True, allow_unused=True)
    silent = [name for (name, value), gradient in zip(outputs.items(), gradients) if gradient is not None and not bool(gradient.any())]
    zero = [name for name, parameter in subject.parameters.items() if parameter.dim() > 1 and not bool(parameter.any())]
    if len(zero) > 1 and silent:
        yield Finding("zero_product_init", f"{listed(zero)} start at zero, and one stops the gradient of the other.")
        return
    for name in reversed(silent):
        value = outputs[name].detach().float()
        if signals[name][1] > 0 and float(value.max()) < -3.0:
            yield Finding("dead_units", f"all {value.shape[-1]} units of {name} lie between {float(value.min()):.3g} and "
                          f"{float(value.max()):.3g}, where the activation behind it is flat.")
            return


def _equal_units(subject: Subject) -> Iterator[Finding]:
    """No weight matrix has equal rows that receive equal gradients."""
    live = {name: p for name, p in subject.parameters.items() if p.requires_grad and p.dim() > 1 and p.shape[0] > 1}
    alike = [name for name, p in live.items() if bool((p == p[:1]).all()) and bool(p.any())]
    if alike:
        yield Finding("symmetric_init", f"all units of {listed(alike)} start with the same weights.")


CHECKS = {"the step calls the network itself": same_network, "answers depend on the scene, and on no other": reads_scenes,
          "inputs are of order one in any unit": scale, "inputs can carry the answer": information,
          "dropout and modes": randomness, "answers are not at the ends of a range": saturation,
          "signals pass every layer": layers}
