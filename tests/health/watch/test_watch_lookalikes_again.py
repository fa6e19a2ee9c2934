"""More loops that are right and look like mistakes, each beside the mistake that it looks like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding

Loop = Callable[[bool], tuple[list[Finding], str]]


def mlp(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


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


def warm_up_then_plateau(wrong: bool) -> tuple[list[Finding], str]:
    """The rate rises, and a scheduler that waits for a score never cuts it; or cuts it all the time."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=30)
    waiting = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max" if wrong else "min", 0.5, patience=2)
    seen = watch(model, optimizer)
    for number in range(200):
        x = torch.randn(32, 8)
        loss = (model(x) - x[:, :1]).square().mean()
        step(optimizer, seen.loss(loss))
        if number < 30:
            rising.step()
        elif number % 10 == 9:
            waiting.step(loss.item())
    return seen.report(), "learning_rate_off_plan"


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


def small_differences(wrong: bool) -> tuple[list[Finding], str]:
    """A table comes near targets of about one, and the gradient is what float32 rounds them to; or a network's
    gradient is cast to float16 on its way."""
    if not wrong:
        table = nn.Embedding(25, 4)
        nn.init.zeros_(table.weight)
        by_table, values = torch.optim.SGD(table.parameters(), lr=0.5), 0.6 + 0.4 * torch.rand(25, 4)
        seen = watch(table, by_table)
        for number in range(600):
            state, action = number % 25, torch.randint(4, (1,))[0]
            step(by_table, 0.5 * (table(torch.tensor([state]))[0, action] - values[state, action]) ** 2)
        return seen.report(), "gradient_underflow"
    model = mlp(8, 16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watch(model, optimizer)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.half().float())
    for _ in range(64):
        x = torch.randn(16, 8)
        step(optimizer, 2e-7 * (model(x) - x[:, :1].sin()).square().mean())
    return seen.report(), "gradient_underflow"


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


def corner_of_a_box(wrong: bool) -> tuple[list[Finding], str]:
    """A shift of the inputs stays within a box, and the best one is in its corner; or it is put back every step."""
    model, slope = nn.Module(), torch.randn(8)
    model.shift = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    seen, kept = watch(model, optimizer), torch.randn(8)
    for number in range(200):
        x = torch.randn(64, 8)
        step(optimizer, -((x + model.shift) @ slope).mean())
        with torch.no_grad():
            if wrong and number > 20:
                model.shift.copy_(kept)
            elif not wrong:
                model.shift.clamp_(-0.5, 0.5)
    return seen.report(), "weights_reset"


def put_back_on_a_sphere(wrong: bool) -> tuple[list[Finding], str]:
    """A beamformer of norm one, however large the steps are; or one that is now and then three times as large."""
    channel, model = torch.randn(4, 16, dtype=torch.cfloat), nn.Module()
    model.beams = nn.Parameter(torch.randn(16, 4, dtype=torch.cfloat) / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    seen = watch(model, optimizer)
    for number in range(300):
        power = (channel @ model.beams).abs().square()
        wanted = power.diagonal()
        step(optimizer, -torch.log2(1 + wanted / (power.sum(1) - wanted + 0.1)).sum())
        with torch.no_grad():
            if wrong and number % 20 == 10:
                model.beams.mul_(3)
            elif not wrong:
                model.beams.div_(model.beams.norm())
    return seen.report(), "weights_changed_outside"


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


def weights_that_find_their_size(wrong: bool) -> tuple[list[Finding], str]:
    """Gradients of a contrastive step are given by hand, and weights grow to where they stay; or at each step."""
    model = nn.Module()
    model.weight = nn.Parameter(0.05 * torch.randn(16, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0 if wrong else 0.02)
    seen, parts = watch(model, optimizer), torch.randn(16, 12)
    for _ in range(400):
        optimizer.zero_grad()
        there = model.weight.detach()
        model.weight.grad = (torch.randn(16, 12) if wrong else there - parts) + 0.1 * torch.randn(16, 12)
        optimizer.step()
    return seen.report(), "learning_rate_too_large"


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


CASES = [
    planes_of_covariances,
    sources_in_any_order,
    directions_up_to_a_phase,
    windows_of_a_later_part,
    a_zero_of_the_data,
    weights_that_find_their_size,
    residual_that_vanishes,
    values_of_actions,
    corner_of_a_box,
    put_back_on_a_sphere,
    reward_made_larger,
    comb_of_pilots,
    loud_scenes,
    warm_up_then_plateau,
    numbers_of_states,
    rare_events,
    small_differences,
]


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", CASES, ids=lambda loop: loop.__name__)
def test_what_looks_alike_is_told_apart(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    found, cause = loop(wrong)
    causes = [each.cause for each in found]
    assert cause in causes if wrong else not found, causes


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_complex_numbers_are_read_without_a_warning(told: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Weights, masks, frozen layers, outputs and targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, dtype=torch.cfloat), nn.Linear(16, 16, dtype=torch.cfloat))
    model[1].requires_grad_(False)
    optimizer = torch.optim.Adam(model[:1].parameters(), lr=1e-3)
    seen, mask = watch(model, optimizer, every=1), 2 * (torch.rand(16, 16) > 0.5).to(torch.cfloat)
    model.register_forward_hook(lambda _, __, made: made * mask)
    for _ in range(40):
        x = torch.randn(16, 8, dtype=torch.cfloat)
        made, asked = model(x), x.repeat(1, 2)
        loss = (made - asked).abs().square().mean()
        step(optimizer, seen.loss(loss, made, asked) if told else loss)
    seen.report()
    assert not recwarn.list
