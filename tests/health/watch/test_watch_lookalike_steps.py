"""Loops whose steps, weights or gradients are right and look like a mistake, each beside that mistake."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from ris_fast.health.names import begins
from tests.health.watch.loops import Loop, mlp, step


def declared_frozen(wrong: bool) -> tuple[list[Finding], str]:
    """One layer of eleven is declared frozen, and is."""
    model = nn.Sequential(*(nn.Linear(8, 8) if number != 9 else nn.Tanh() for number in range(10)), nn.Linear(8, 1))
    model[1].requires_grad_(wrong)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seen = watch(model, optimizer, frozen=("1",))
    for _ in range(40):
        x = torch.randn(16, 8)
        step(optimizer, (model(x) - x[:, :1]).square().mean())
    return seen.report(), "settings_changed"


def one_part_evaluated(wrong: bool) -> tuple[list[Finding], str]:
    """Of two networks in a container one is evaluated, in evaluation mode, while the other stays as it is."""
    made, judge = mlp(4, 16, 2), nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    made.append(nn.Dropout(0.1))
    both = nn.ModuleList([made, judge])
    by_made, by_judge = (torch.optim.Adam(each.parameters(), lr=1e-3) for each in (made, judge))
    seen = watch(both, [by_made, by_judge])
    for number in range(60):
        fake = made(torch.randn(32, 4))
        step(by_judge, F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(torch.randn(32, 2))).mean())
        step(by_made, F.softplus(-judge(fake)).mean())
        if number % 10 == 9:
            made.eval()
            made[-1].train(wrong)
            with torch.no_grad():
                made(torch.randn(32, 4))
            made.train()
    return seen.report(), "train_mode_in_validation"


def samples_of_dropout(wrong: bool) -> tuple[list[Finding], str]:
    """Dropout stays on in an evaluation that asks for each scene several times; or for each once, by mistake."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer, held = torch.optim.Adam(model.parameters(), lr=1e-2), torch.randn(32, 8)
    seen = watch(model, optimizer)
    for number in range(80):
        x = torch.randn(32, 8)
        step(optimizer, (model(x) - x[:, :1]).square().mean())
        if number % 20 == 19:
            model.eval()
            model[2].train()
            with torch.no_grad():
                for _ in range(1 if wrong else 4):
                    model(held)
            model.train()
    return seen.report(), "train_mode_in_validation"


def steps_tried_again(wrong: bool) -> tuple[list[Finding], str]:
    """A backtracking line search: a step is taken back and made with half the rate, until the loss falls by enough. By
    mistake, it is not taken back."""
    model, x = mlp(8, 32, 1), torch.randn(256, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen, weights = watch(model, optimizer), list(model.parameters())

    def loss() -> Tensor:
        return F.mse_loss(model(x), x[:, :1])

    for _ in range(60):
        optimizer.zero_grad()
        (first := loss()).backward()
        before, slope = [each.detach().clone() for each in weights], sum(each.grad.square().sum() for each in weights)
        rate = 4.0
        while rate > 1e-4:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            with torch.no_grad():
                if loss() <= first - 0.3 * rate * slope:
                    break
                for weight, value in zip(weights, before):
                    if not wrong:
                        weight.copy_(value)
            rate /= 2
    return seen.report(), "step_called_twice"


def gradients_of_a_copy(wrong: bool) -> tuple[list[Finding], str]:
    """A worker differentiates its copy of the model, and hands the gradients over; or fails to."""
    model, worker = mlp(8, 32, 1), mlp(8, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(100):
        worker.load_state_dict(model.state_dict())
        x = torch.randn(32, 8)
        made = worker(x)
        worker.zero_grad()
        seen.loss(F.mse_loss(made, x[:, :1]), made, x[:, :1]).backward()
        for weight, other in zip(model.parameters(), worker.parameters()):
            weight.grad = torch.zeros_like(weight) if wrong else other.grad
        optimizer.step()
    return seen.report(), "detached_loss"


class DualAveraging(torch.optim.Optimizer):
    """Steps from the first weights along the sum of all gradients (Nesterov 2009), which `grad` holds."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.made = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.made += 1
        for weight in self.param_groups[0]["params"]:
            first = self.state[weight].setdefault("first", weight.clone())
            weight.copy_(first - 0.1 * self.made**-0.5 * weight.grad)


def gradients_added_up(wrong: bool) -> tuple[list[Finding], str]:
    """Gradients are never cleared: for an optimizer that asks for their sum, or for one of torch's."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3) if wrong else DualAveraging(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(100):
        x = torch.randn(32, 8)
        F.mse_loss(model(x), x[:, :1]).backward()
        optimizer.step()
    return [each for each in seen.report() if each.certain], "gradients_never_cleared"


def gradients_of_a_formula(wrong: bool) -> tuple[list[Finding], str]:
    """The gradient of a linear model is written down; the loss is told, a number without a history. Or it is not."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = watch(model, optimizer)
    for _ in range(100):
        x = torch.randn(32, 8)
        made = model(x)
        off = (made - x[:, :1]).detach()
        if not wrong:
            model.weight.grad, model.bias.grad = off.T @ x / 32, off.mean(0)
        seen.loss(off.square().mean(), made, x[:, :1])
        optimizer.step()
    return seen.report(), "detached_loss"


def turned_round_by_hand(wrong: bool) -> tuple[list[Finding], str]:
    """A reward is raised: its gradients are turned round and scaled. By mistake, a threshold below zero does that."""
    model = mlp(8, 32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    seen = watch(model, optimizer)
    for _ in range(100):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        (loss if wrong else -loss).backward()
        if wrong:
            nn.utils.clip_grad_norm_(model.parameters(), -1.0)
        else:
            for weight in model.parameters():
                weight.grad.mul_(-0.5)
        optimizer.step()
    return [each for each in seen.report() if each.certain], "clip_too_small"


def layer_drawn_anew(wrong: bool) -> tuple[list[Finding], str]:
    """A layer is made in each pass: at random, at the input, as an augmentation, or behind the first by mistake."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and not wrong:
                x = x + 0.1 * nn.Linear(8, 8, bias=False)(x)
            hidden = self.first(x).tanh()
            return self.last(nn.Linear(32, 32, bias=False)(hidden) if wrong else hidden)

    model = Drawn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(100):
        x = torch.randn(32, 8)
        step(optimizer, F.mse_loss(model(x), x[:, :1]))
    return [each for each in seen.report() if each.certain], "unregistered_parameters"


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


LOOPS = {
    each.__name__: each
    for each in (
        declared_frozen,
        one_part_evaluated,
        samples_of_dropout,
        steps_tried_again,
        gradients_of_a_copy,
        gradients_added_up,
        gradients_of_a_formula,
        turned_round_by_hand,
        layer_drawn_anew,
        warm_up_then_plateau,
        small_differences,
        corner_of_a_box,
        put_back_on_a_sphere,
        weights_that_find_their_size,
    )
}


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_what_looks_alike_is_told_apart(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    found, cause = loop(wrong)
    causes = [each.cause for each in found]
    assert cause in causes if wrong else not found, causes


def test_a_history_behind_gradients_is_no_error(recwarn: pytest.WarningsRecorder) -> None:
    """Of a loop that differentiates its steps."""
    torch.manual_seed(0)
    model = mlp(8, 8, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer)
    for _ in range(20):
        x = torch.randn(16, 8)
        made = model(x)
        loss = seen.loss(F.mse_loss(made, x[:, :1]), made, x[:, :1])
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        step(optimizer, loss + 1e-3 * sum(each.square().sum() for each in slopes))
    assert seen.report() == [] and not recwarn.list


def test_a_number_ends_where_its_digits_do() -> None:
    names = ["net.1.weight", "net.10.weight", "network.weight", "layer1.0.bias", "layer10.0.bias"]
    assert [name for name in names if begins(name, ("net.1", "layer1"))] == ["net.1.weight", "layer1.0.bias"]
    assert [name for name in names if begins(name, ("net",))] == names[:3]
    assert not any(begins(name, ()) for name in names)


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
