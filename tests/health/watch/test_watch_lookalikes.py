"""Loops that are right and look like mistakes, each beside the mistake that it looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from ris_fast.health.names import begins

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


LOOPS = {
    each.__name__: each
    for each in (
        declared_frozen,
        unusable_batches,
        places_of_partners,
        pairs_of_scenes,
        in_other_units,
        weight_that_rises,
        one_part_evaluated,
        samples_of_dropout,
        both_sets_evaluated,
        steps_tried_again,
        gradients_of_a_copy,
        turned_round_by_hand,
        layer_drawn_anew,
        gradients_added_up,
        gradients_of_a_formula,
    )
}


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_what_looks_alike_is_told_apart(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    found, cause = loop(wrong)
    assert cause in [each.cause for each in found] if wrong else found == []


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
