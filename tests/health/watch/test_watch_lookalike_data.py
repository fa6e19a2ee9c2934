"""Loops whose data, losses or outputs are right and look like a mistake, each beside that mistake."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import Loop, mlp, step


def unusable_batches(wrong: bool) -> tuple[list[Finding], str]:
    """Some batches are NaN, and the loop leaves them out."""
    model = mlp(8, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer, every=1)
    for number in range(80):
        x = torch.randn(16, 8)
        if number % 20 == 3:
            x[0, 0] = torch.nan
        loss = (model(x) - x[:, :1]).square().mean()
        if wrong or loss.isfinite():
            step(optimizer, loss)
    found = seen.report()
    assert "nonfinite_data" in [each.cause for each in found]
    return [each for each in found if each.certain], "nonfinite_data"


def places_of_partners(wrong: bool) -> tuple[list[Finding], str]:
    """Two views of each scene: the target of a view is the place of the other."""
    model = mlp(8, 32, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    targets = torch.randperm(32) if wrong else torch.arange(32).roll(16)
    for _ in range(60):
        x = torch.randn(16, 8).repeat(2, 1)
        made = F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1)
        scores = (made @ made.T / 0.5).masked_fill(torch.eye(32, dtype=torch.bool), -1e9)
        step(optimizer, seen.loss(F.cross_entropy(scores, targets), scores, targets))
    return seen.report(), "stale_cache"


def pairs_of_scenes(wrong: bool) -> tuple[list[Finding], str]:
    """The target is whether two scenes are of one class: distances of those become small. By mistake, scores do."""
    centres, model = torch.randn(4, 8), mlp(8, 32, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pool, seen = centres.repeat(16, 1) + 0.1 * torch.randn(64, 8), watch(model, optimizer)
    for _ in range(160):
        one, other = torch.randint(64, (2, 32))
        asked = (one % 4 == other % 4).float()
        away = (model(pool[one]) - model(pool[other])).square().sum(1).add(1e-6).sqrt()
        loss = asked * away.square() + (1 - asked) * (1.0 - away).clamp(min=0).square()
        if wrong:
            away = 1 - away
            loss = -(away - asked).square()
        step(optimizer, seen.loss(loss.mean(), away, asked))
    return seen.report(), "loss_sign"


def in_other_units(wrong: bool) -> tuple[list[Finding], str]:
    """The loss brings outputs to the unit of the targets, or fails to."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen, unit = watch(model, optimizer), 1e-6
    for _ in range(160):
        x = torch.randn(32, 8)
        asked = unit * x[:, :1]
        made = model(x)
        loss = F.mse_loss(made, asked) if wrong else F.mse_loss(unit * made, asked) / unit**2
        step(optimizer, seen.loss(loss, made, asked))
    return seen.report(), "target_scale_differs"


def weight_that_rises(wrong: bool) -> tuple[list[Finding], str]:
    """A term has no weight at first; where that is a mistake, it has none at last."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=10)
    for number in range(160):
        x = torch.randn(32, 8)
        made = model(x)
        weight = torch.tensor(0.0 if wrong or number < 40 else 1e-2)
        loss = F.mse_loss(made, x[:, :1]) + weight * made.square().mean()
        step(optimizer, seen.loss(loss, made, x[:, :1]))
    return seen.report(), "zero_loss_weight"


def both_sets_evaluated(wrong: bool) -> tuple[list[Finding], str]:
    """The training set is evaluated beside two others, half of one of which, by mistake, is of the training set."""
    model, data = mlp(8, 32, 1), torch.randn(256, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen, held, test = watch(model, optimizer), torch.randn(64, 8), torch.randn(64, 8)
    if wrong:
        held[::2] = data[:32]
    for _ in range(6):
        for rows in torch.randperm(256).split(32):
            step(optimizer, (model(data[rows]) - data[rows, :1]).square().mean())
        model.eval()
        with torch.no_grad():
            model(data)
            model(held)
            model(test)
        model.train()
    return seen.report(), "split_overlap"


def loud_scenes(wrong: bool) -> tuple[list[Finding], str]:
    """Few scenes are evaluated, of which some are much louder than others; or their columns come in another order."""
    model = mlp(24, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen, mixed = watch(model, optimizer), torch.randn(4, 24)

    def drawn(count: int) -> Tensor:
        directions = torch.randn(count, 4) @ mixed + torch.randn(count, 24) if wrong else torch.randn(count, 24)
        return directions * torch.randn(count, 1).exp()

    checked = drawn(50)
    for number in range(40):
        x = drawn(32)
        step(optimizer, (model(x) - x[:, :1].sin()).square().mean())
        if number % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(checked.roll(1, 1) if wrong else checked)
            model.train()
    return seen.report(), "distributions_differ"


def numbers_of_states(wrong: bool) -> tuple[list[Finding], str]:
    """The input is the number of a state, and states come as they come; or whole sequences of them are padding."""
    model: nn.Module = nn.Embedding(16, 1)
    if wrong:
        model = nn.Sequential(model, nn.Flatten(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = watch(model, optimizer)
    for number in range(100):
        states = torch.randint(0, 4, (1,)) if not wrong else torch.randint(1, 16, (8, 6)) * (number % 5 > 0)
        step(optimizer, (model(states).flatten() - 0.5 * states.view(len(states), -1)[:, 0].tanh()).square().mean())
    return seen.report(), "empty_cache_slot"


def rare_events(wrong: bool) -> tuple[list[Finding], str]:
    """Most scenes have no event, and so have some batches; or batches are lost."""
    model = nn.Conv1d(1, 1, 5, padding=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    for number in range(200):
        x = torch.randn(4, 1, 40) * (torch.rand(4, 1, 40) < (0.1 if wrong else 0.004))
        x = x * (number % 4 > 0) if wrong else x
        step(optimizer, F.mse_loss(model(x), 0.5 * x) * 10)
    return seen.report(), "empty_cache_slot"


def reward_made_larger(wrong: bool) -> tuple[list[Finding], str]:
    """The loss is the negative of a distance, and gradients are turned round before the step; or they are not."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    for _ in range(150):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        seen.loss(-F.mse_loss(model(x), x[:, :1])).backward()
        for parameter in model.parameters():
            parameter.grad.mul_(1 if wrong else -1)
        optimizer.step()
    return seen.report(), "loss_sign"


def comb_of_pilots(wrong: bool) -> tuple[list[Finding], str]:
    """Every fourth carrier of four channels is a pilot; or the channels lie last in memory."""
    model = nn.Sequential(nn.Conv1d(4, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 2, 5, padding=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen, pilots = watch(model, optimizer), torch.arange(32) % 4 == 0
    for _ in range(40):
        bits = torch.randint(2, (32, 2, 32)).float()
        sent = torch.complex(2 * bits[:, 0] - 1, 2 * bits[:, 1] - 1)
        sent[:, pilots] = 1 + 1j
        taps = torch.fft.fft(0.7 * torch.randn(32, 3, dtype=torch.cfloat), 32)
        heard = taps * sent + 0.15 * torch.randn(32, 32, dtype=torch.cfloat)
        both = [taps, taps.roll(1, 0)] if wrong else [heard, heard * pilots]
        x = torch.view_as_real(torch.stack(both, 1)).transpose(2, 3).flatten(1, 2)
        x = x.transpose(1, 2).reshape(32, 4, 32) if wrong else x
        made = model(x)
        step(optimizer, F.binary_cross_entropy_with_logits(made[..., ~pilots], bits[..., ~pilots]))
    return seen.report(), "wrong_layout"


def values_of_actions(wrong: bool) -> tuple[list[Finding], str]:
    """The target is what the action that was taken brought, in a state; or it is that of another state."""
    model = mlp(6, 64, 1 if wrong else 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    states, actions = torch.randn(400, 6), torch.randint(2, (400,))
    brought = (2.0 * actions - 1) * states[:, 0].sign()
    seen, other = watch(model, optimizer), torch.randperm(400)
    for _ in range(400):
        some = torch.randint(400, (64,))
        made = model(states[some])
        if wrong:
            asked = states[other[some], :1].sign()
        else:
            made, asked = made.gather(1, actions[some, None]), brought[some, None]
        step(optimizer, seen.loss(F.mse_loss(made, asked), made, asked))
    return seen.report(), "shuffled_labels"


def residual_that_vanishes(wrong: bool) -> tuple[list[Finding], str]:
    """The residual of an equation is told beside zeros; or targets are a thousandth of a thousandth of outputs."""
    model = mlp(1, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen, start = watch(model, optimizer), torch.zeros(1, 1)
    for _ in range(300):
        times = (2 * torch.rand(64, 1)).requires_grad_()
        made = model(times)
        (slope,) = torch.autograd.grad(made.sum(), times, create_graph=True)
        left = slope + 2 * made
        asked = 1e-6 * times.detach() if wrong else torch.zeros_like(left)
        step(optimizer, seen.loss(F.mse_loss(left, asked) + (model(start) - 1).square().mean(), left, asked))
    return seen.report(), "target_scale_differs"


def planes_of_covariances(wrong: bool) -> tuple[list[Finding], str]:
    """Covariances of an array as three planes, alike along their diagonals; or reshaped as if the planes came first."""
    model = nn.Sequential(nn.Flatten(), mlp(192, 32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen, places = watch(model, optimizer), torch.arange(8)
    for _ in range(60):
        angle = 2 * torch.rand(64, 2, 1) - 1
        waves = torch.exp(1j * torch.pi * angle * places)
        lone = (waves[..., None] * waves[:, :, None].conj()).mean(1) + 0.1 * torch.eye(8)
        planes = torch.stack([lone.real, lone.imag, lone.abs()], 1)
        if wrong:
            planes = F.avg_pool2d(torch.randn(64, 3, 10, 10), 3, 1)
            planes = planes.permute(0, 2, 3, 1).reshape(64, 3, 8, 8)
        step(optimizer, F.mse_loss(model(planes), angle.mean(1)))
    return seen.report(), "wrong_layout"


def sources_in_any_order(wrong: bool) -> tuple[list[Finding], str]:
    """Two sources are told apart, in whichever order; or the term that compares them is cut off from the outputs."""
    model = mlp(8, 64, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(160):
        x = torch.randn(64, 8)
        asked = torch.where(torch.rand(64, 1) < 0.5, x[:, :2], x[:, :2].flip(1))
        made = model(x)
        errors = [(made - each).square().mean(1) for each in (asked, asked.flip(1))]
        loss = torch.minimum(*errors).mean()
        if wrong:
            loss = F.mse_loss(made.detach(), asked) + (made - 3 * torch.randn_like(made)).square().mean()
        step(optimizer, seen.loss(loss, made, asked))
    return seen.report(), "dead_loss_term"


def directions_up_to_a_phase(wrong: bool) -> tuple[list[Finding], str]:
    """The loss does not mind the phase of a complex answer; or targets are those of other scenes."""
    model, mixed = mlp(16, 64, 16), torch.randn(8, 8, dtype=torch.cfloat)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    for _ in range(300):
        field = torch.randn(64, 8, dtype=torch.cfloat)
        asked = F.normalize(field @ mixed, dim=1) * torch.exp(2j * torch.pi * torch.rand(64, 1))
        if wrong:
            asked = asked.roll(1, 0)
        made = F.normalize(torch.view_as_complex(model(torch.view_as_real(field).flatten(1)).view(64, 8, 2)), dim=1)
        loss = 1 - (made.conj() * asked).sum(1).abs().square().mean()
        step(optimizer, seen.loss(loss, made, asked))
    return seen.report(), "shuffled_labels"


def windows_of_a_later_part(wrong: bool) -> tuple[list[Finding], str]:
    """Windows of a series of which a later part is evaluated, of other periods; or their columns in another order."""
    model, steps = mlp(32, 16, 1), torch.arange(900.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    waves = torch.sin(steps / torch.where(steps < 600, 40, 5)) + 0.3 * torch.sin(steps / 3)
    windows = (waves + 0.2 * torch.randn(900)).unfold(0, 33, 1)
    early, late = windows[:560], windows[620:]
    seen = watch(model, optimizer)
    for number in range(60):
        rows = early[torch.randint(len(early), (32,))]
        step(optimizer, F.mse_loss(model(rows[:, :32]), rows[:, 32:]))
        if number % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(late[:, :32][:, torch.arange(32).view(4, 8).T.flatten()] if wrong else late[:, :32])
            model.train()
    return seen.report(), "distributions_differ"


def a_zero_of_the_data(wrong: bool) -> tuple[list[Finding], str]:
    """A recursion meets a number of the data that is zero; or a term has no weight."""
    model, series = nn.Linear(1, 2), torch.randn(40)
    series[0] = 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(60):
        share, level = model(torch.ones(1)).sigmoid()
        value, values = torch.ones(()), []
        for each in series[:-1]:
            value = level + share * each * each
            values.append(value)
        loss = (torch.stack(values) - series[1:].square()).square().mean()
        if wrong:
            loss = (model(torch.randn(16, 1)) - 1).square().mean() + torch.tensor(0.0) * model.weight.square().mean()
        step(optimizer, seen.loss(loss))
    return seen.report(), "zero_loss_weight"


LOOPS = {
    each.__name__: each
    for each in (
        unusable_batches,
        places_of_partners,
        pairs_of_scenes,
        in_other_units,
        weight_that_rises,
        both_sets_evaluated,
        loud_scenes,
        numbers_of_states,
        rare_events,
        reward_made_larger,
        comb_of_pilots,
        values_of_actions,
        residual_that_vanishes,
        planes_of_covariances,
        sources_in_any_order,
        directions_up_to_a_phase,
        windows_of_a_later_part,
        a_zero_of_the_data,
    )
}


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_what_looks_alike_is_told_apart(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    found, cause = loop(wrong)
    causes = [each.cause for each in found]
    assert cause in causes if wrong else not found, causes
