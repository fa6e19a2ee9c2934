"""What `watch` sees of forward passes: those thrown away, layers that nobody trains, modes; and healthy loops that look
alike."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ris_fast.health import watch
from ris_fast.health.finding import Finding
from tests.health.watch.loops import network


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def batch(size: int = 32) -> Tensor:
    return torch.randn(size, 8)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1.0).square().mean()


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def causes(found: list[Finding], certain: bool = True) -> list[str]:
    return [finding.cause for finding in found if finding.certain or not certain]


# ---- passes that no backward reaches ----


@pytest.mark.parametrize("size", [3, 8])
def test_watch_names_steps_outside_of_the_loop_over_batches(size: int) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(4):
        total = 0.0
        for _ in range(size):
            loss = loss_of(model(batch()))
            total += loss.item()
        update(optimizer, loss)
    found = seen.report()
    assert causes(found, False) == ["forwards_without_backward"] and found[0].certain
    assert f"{size} forward passes, 1 backward: {size - 1} of {size} batches reach no loss" in found[0].evidence
    assert "at all 4 steps" in found[0].evidence and "test_watch_forward.py:" in found[0].evidence


def test_watch_counts_long_epochs_and_doubts_a_single_one() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for epoch in range(3):
        for _ in range(400):
            loss = loss_of(model(batch(2)))
        update(optimizer, loss)
        (finding,) = seen.report()
        assert finding.cause == "forwards_without_backward" and finding.certain == (epoch == 2)
    assert "399 of 400 batches" in finding.evidence and len(seen.forward.passes) == 1200


class Branches(nn.Module):
    """Outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"main": self.body(x), "more": (self.head(x), x)}


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    for _ in range(8):
        loss_of(model(batch())).backward()
    optimizer.step()


def sum_up(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    update(optimizer, sum(loss_of(model(batch())) for _ in range(8)))


def triplet(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    update(optimizer, nn.functional.triplet_margin_loss(*(model(batch()) for _ in range(3)), margin=9.0))


def critic_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number in range(5):
        fake = model(batch())
        if number == 4:
            update(optimizer, loss_of(fake))


def evaluate_after(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    update(optimizer, loss_of(model(batch())))
    for _ in range(7):
        model(batch()).sum()


def roll_out(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(16):
        model(batch(1)).argmax()
    update(optimizer, loss_of(model(batch())))


def pseudo_labels(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = batch()
    guesses = [model(x + 0.1).detach() for _ in range(3)]
    update(optimizer, (model(x) - sum(guesses)).square().mean())


def hardest(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    update(optimizer, max(loss_of(model(batch())) for _ in range(8)))


def attack(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = batch().requires_grad_()
    for _ in range(3):
        (slope,) = torch.autograd.grad(loss_of(model(x)), x)
        x = (x + 0.1 * slope.sign()).detach().requires_grad_()
    update(optimizer, loss_of(model(x)))


def recompute(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    update(optimizer, loss_of(checkpoint(model, batch(), use_reentrant=False)))


@pytest.mark.parametrize(
    "habit",
    [accumulate, sum_up, triplet, evaluate_after, roll_out, pseudo_labels, attack, recompute],
)
def test_watch_allows_passes_of_all_kinds(habit: Callable[..., Any]) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        habit(model, optimizer)
    assert seen.report() == []


@pytest.mark.parametrize("habit", [hardest])
def test_watch_doubts_passes_that_are_chosen(habit: Callable[..., Any]) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        habit(model, optimizer)
    assert causes(seen.report()) == []


@pytest.mark.parametrize("own", [True, False])
def test_watch_allows_a_generator_that_waits_for_its_critic(own: bool) -> None:
    generator, critic = network(), nn.Linear(4, 1)
    optimizer, other = sgd(generator.parameters()), sgd(critic.parameters())
    seen = watch(generator, optimizer) if own else watch(critic, other)
    for number in range(40):
        fake = generator(batch())
        if number % 5 == 4:
            update(optimizer, -critic(fake).mean())
        else:
            update(other, critic(fake.detach()).mean())
    assert causes(seen.report()) == []


def test_watch_allows_states_kept_in_the_model() -> None:
    """Each pass goes on from the state of the one before: a loss on the last output reaches all."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.out = nn.Linear(16, 8), nn.Linear(8, 4)
            self.state = torch.zeros(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.state = self.step(torch.cat([x, self.state], 1)).tanh()
            return self.out(self.state)

    model = Recurrent()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        model.state = torch.zeros(32, 8)
        for _ in range(8):
            output = model(batch())
        update(optimizer, loss_of(output))
    assert causes(seen.report()) == []


def test_watch_reads_any_output_partly_used() -> None:
    model = Branches()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer, frozen=("head",))
    for _ in range(10):
        update(optimizer, loss_of(model(batch())["main"]))
    assert seen.report() == []


# ---- tensors that nobody trains ----


class Hidden(nn.Module):
    """Layers and weights where no optimizer finds them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Linear(8, 8)
        self.last = nn.Linear(8, 16)
        if kind == "list":
            self.layers = [nn.Linear(8, 8), {"deep": nn.Linear(8, 8)}]
        if kind == "plain":
            self.scale = torch.ones(8, requires_grad=True)
        if kind == "shadowed":
            self.parameters = lambda recurse=True: iter([*self.last.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.kind == "list":
            x = self.layers[1]["deep"](self.layers[0](x))
        if self.kind == "plain":
            x = x * self.scale
        if self.kind == "anew":
            x = nn.Linear(8, 8)(x)
        if self.kind == "augmentation":
            x = nn.Linear(8, 8)(torch.ones(len(x), 8)) * 0.01 + x
        return self.last(x)


@pytest.mark.parametrize(
    "kind, cause, said",
    [
        ("list", "unregistered_parameters", "layers[0].weight"),
        ("plain", "unregistered_parameters", "scale"),
        ("shadowed", "shadowed_parameters", "first.weight"),
        ("anew", "unregistered_parameters", "(8, 8), (8,)"),
    ],
)
def test_watch_names_tensors_that_nobody_trains(kind: str, cause: str, said: str) -> None:
    model = Hidden(kind)
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        update(optimizer, loss_of(model(batch())))
    finding = next(finding for finding in seen.report() if finding.cause == cause)
    assert finding.certain and said in finding.evidence


def test_watch_doubts_a_hidden_teacher() -> None:
    """In a list on purpose, so that no optimizer and no checkpoint has it; its answers are detached by the loss."""

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.teacher = network(), [nn.Linear(8, 4)]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), self.teacher[0](x)

    model = Taught()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        output, target = model(batch())
        update(optimizer, (output - target.detach()).square().mean())
    assert causes(seen.report()) == [] and causes(seen.report(), False) == ["unregistered_parameters"]


def of_another_optimizer(model: nn.Module) -> None:
    model.other = torch.optim.SGD([model.scale], lr=1e-2)


def shrink(model: nn.Module, *_: Any) -> None:
    model.scale.data.mul_(0.999)


@pytest.mark.parametrize(
    "change",
    [of_another_optimizer, lambda model: model.register_forward_hook(shrink)],
)
def test_watch_allows_tensors_that_something_else_trains(change: Callable[..., Any]) -> None:
    model = Hidden("plain")
    optimizer = sgd(model.parameters())
    seen, _ = watch(model, optimizer), change(model)
    for _ in range(10):
        update(optimizer, loss_of(model(batch())))
    assert seen.report() == []


class Slopes(nn.Module):
    """Derivatives by points that the model makes itself, as implicit representations have them."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.points = torch.randn(32, 8, requires_grad=True) if kept else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        points = x.detach().clone().requires_grad_() if self.points is None else self.points
        return self.net(points), points


@pytest.mark.parametrize("kept", [True, False])
def test_watch_allows_derivatives_by_points(kept: bool) -> None:
    model = Slopes(kept)
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        values, points = model(batch())
        (slopes,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        update(optimizer, (slopes - 1).square().mean() + values.square().mean())
    assert causes(seen.report()) == []


def test_watch_allows_weights_from_elsewhere() -> None:
    """A network that makes another's weights, fast weights, and inputs that come from another network."""
    model, maker = nn.Linear(8, 4), nn.Linear(2, 36)
    other = sgd(maker.parameters())
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        made = maker(torch.ones(2))
        loss = loss_of(functional_call(model, {"weight": made[:32].view(4, 8), "bias": made[32:]}, (batch(),)))
        fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss_of(functional_call(model, fast, (batch(),))).backward()
        update(other, loss)
        update(optimizer, loss_of(model(nn.functional.pad(maker(torch.ones(4, 2)), (0, 4)).view(-1, 8))))
    assert causes(seen.report()) == []


def test_watch_names_a_part_whose_gradients_stop_inside() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.gate(x).sigmoid().detach()

    model = Gate()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(10):
        update(optimizer, loss_of(model(batch())))
    finding = next(finding for finding in seen.report() if finding.cause == "detached_backbone")
    assert not finding.certain and "gate.weight 44 %" in finding.evidence  # later, it may


# ---- modes ----


def modal(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, **options), nn.Dropout(0.5), nn.Linear(16, 4))


def epochs(model: nn.Module, evaluate: Callable[..., Any], after: Callable[..., Any] = lambda: None) -> list[Finding]:
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(4):
        for _ in range(6):
            update(optimizer, loss_of(model(batch())))
        evaluate()
        with torch.no_grad():
            for _ in range(3):
                model(batch())
        after()
    return seen.report()


def test_watch_doubts_modes_that_are_left_as_they_were() -> None:
    model = modal()
    assert epochs(model, model.eval, model.train) == []
    found = epochs(model, model.eval)
    assert causes(found) == [] and causes(found, False) == ["eval_mode_in_training"] and found[0].step == 7
    model = modal()
    found = epochs(model, lambda: None)
    assert causes(found) == [] and causes(found, False) == ["train_mode_in_validation"]
    model = network()
    assert epochs(model, model.eval) == epochs(model.train(), lambda: None) == []  # where modes do not matter


def test_watch_doubts_parts_that_stay_in_training_mode() -> None:
    model = modal()
    model[2].train = lambda mode=True: model[2]
    found = epochs(model, model.eval, model.train)
    assert causes(found) == [] and causes(found, False) == ["train_mode_in_validation"]
    assert "1 of 2" in found[0].evidence


def test_watch_names_a_forward_that_calls_eval() -> None:
    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = modal()

        def forward(self, x: Tensor) -> Tensor:
            self.eval()
            return self.net(x)

    model = Switching()
    found = epochs(model, model.eval, model.train)
    assert causes(found) == ["eval_mode_in_training"] and "`forward` calls `eval()`" in found[0].evidence


# ---- what else may happen to a watched model ----


def test_watch_leaves_copies_of_the_model_alone() -> None:
    model = network()
    seen = watch(model, sgd(model.parameters()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert b"ris_fast" not in file.getvalue()
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(batch())
    torch.func.vmap(model)(batch())
    assert seen.forward.count == 0
    model(batch())
    assert seen.forward.count == 1
    seen.close()
    assert not model._forward_hooks and not model._forward_pre_hooks and not model[0]._forward_hooks


def test_watch_hooks_on_parts_go_after_the_first_passes() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    assert model[0]._forward_hooks
    for _ in range(4):
        update(optimizer, loss_of(model(batch())))
    assert not model[0]._forward_hooks and seen.report() == []


# ---- the order of a report ----


def test_watch_report_begins_with_what_does_most_harm() -> None:
    """Gradients that are NaN at every step come before a head that no loss reads, which is named with its share."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.small, self.large = network(), nn.Linear(8, 1), nn.Linear(8, 100)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Headed()
    model.small.requires_grad_(False)
    model.body[0].weight.register_hook(lambda grad: grad * float("nan"))
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    for _ in range(1001):
        update(optimizer, loss_of(model(batch(2))))
        model.body[0].weight.data.nan_to_num_()
    found = seen.report()
    assert [finding.cause for finding in found][:2] == ["nonfinite_gradients", "unused_head"]
    assert found[0].evidence.startswith("body.0.weight, ") and "at all" in found[0].evidence
    assert found[1].evidence.startswith("2 tensors, 80 % of the weights: large.weight 71 %, large.bias 9 %")
    assert found[0].certain and found[1].certain and found[-1].cause == "frozen_parameters"  # the smallest part


# ---- errors of its own ----


@pytest.mark.parametrize("where", ["forward", "backward", "step", "loss", "report"])
def test_watch_ends_no_loop_by_an_error_of_its_own(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("of the watch")

    model = network()
    optimizer = sgd(model.parameters())
    seen = watch(model, optimizer)
    place = {
        "forward": (seen.forward, "_look"),
        "backward": (seen.hooks[0].gradients, "_keep"),
        "step": (seen.hooks[0].schedule, "due"),
        "loss": (seen.losses, "_look"),
        "report": (seen.schedulers, "records"),
    }
    monkeypatch.setattr(*place[where], fails)
    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="error of its own, IndexError: of the watch"):
        update(optimizer, seen.loss(loss_of(model(batch()))))
        assert seen.report() == []
    assert not torch.equal(model[0].weight, before)
