"""What nobody told of a loss follows from its graph and the gradient at the outputs; and of a loop that has learned
nothing the likeliest cause is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.watch.inferred import told_losses
from ris_fast.health.watch.tensors import few_rows
from ris_fast.health.watch.watcher import Watcher

Loss = Callable[[Tensor, Tensor], Tensor]
MIX = torch.linspace(-1.0, 1.0, 8)[:, None]


def network(outputs: int = 1, *last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs), *last)


def numbers(x: Tensor) -> Tensor:
    return torch.tanh(x @ MIX)


def labels(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def signs(x: Tensor) -> Tensor:
    return (x[:, :1] > 0).float()


def loop(
    model: nn.Module,
    lossf: Loss = F.mse_loss,
    targets: Callable[[Tensor], Tensor] = numbers,
    inputs: Callable[[Tensor], Tensor] = lambda x: x,
    told: bool = False,
    steps: int = 260,
    optimizer: torch.optim.Optimizer | None = None,
    after: Callable[[], object] = lambda: None,
) -> Watcher:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer, every=8)  # looks at least so often, however busy the machine
    torch.manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 8)
        output, target = model(inputs(x)), targets(x)
        loss = lossf(output, target)
        if told:
            seen.loss(loss, output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
    return seen


def causes(seen: Watcher) -> list[str]:
    return [each.cause for each in seen.report()]


@pytest.mark.parametrize(
    ("lossf", "outputs", "targets"),
    [
        (F.mse_loss, 1, numbers),
        (lambda o, y: (o - y).square().sum(), 1, numbers),
        (F.cross_entropy, 3, labels),
        (F.binary_cross_entropy_with_logits, 1, signs),
    ],
    ids=["mean square", "sum of squares", "classes", "zeros and ones"],
)
def test_targets_follow_from_the_gradient_at_the_outputs(lossf: Loss, outputs: int, targets: Loss) -> None:
    model, asked = network(outputs), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen = watch(model, optimizer, every=8)  # looks at least so often, however busy the machine
    for _ in range(8):
        x = torch.randn(16, 8)
        asked.append(targets(x))
        optimizer.zero_grad()
        lossf(model(x), asked[-1]).backward()
        optimizer.step()
    known = [each for each in told_losses(seen._record()) if each.targets is not None]
    assert len(known) == 8
    for each in known:
        torch.testing.assert_close(each.targets.few, few_rows([asked[each.step]]), rtol=1e-4, atol=1e-5)


def scaled(factor: float) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        model = network()
        with torch.no_grad():
            for layer in model[:4:2]:
                layer.weight.mul_(factor)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "options", "cause"),
    [
        (network, {"targets": lambda x: torch.randn(32, 1)}, "shuffled_labels"),
        (network, {"targets": lambda x: torch.randn(32, 1), "inputs": lambda x: x / 255}, "input_scale"),
        (network, {"targets": lambda x: torch.randn(32, 1), "inputs": lambda x: x - 100}, "input_scale"),
        (scaled(30.0), {"targets": lambda x: torch.randn(32, 1)}, "bad_initialisation"),
        (lambda: network(1, nn.Sigmoid()), {"targets": lambda x: 3 * numbers(x)}, "limited_output"),
        (lambda: network(3, nn.ReLU()), {"targets": labels, "lossf": F.cross_entropy, "steps": 40}, "limited_output"),
        (network, {"targets": lambda x: 3000 + 500 * numbers(x)}, "target_scale_differs"),
    ],
    ids=["pairs", "small inputs", "offset", "large weights", "sigmoid", "relu", "large targets"],
)
def test_watch_names_the_likeliest_cause_of_what_was_not_learned(make, options, cause: str) -> None:
    assert causes(loop(make(), **options))[0] == cause


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (network, {}),
        (network, {"targets": lambda x: numbers(x) + torch.randn(32, 1)}),
        (lambda: nn.Sequential(nn.LayerNorm(8), *network()), {"inputs": lambda x: 300 * x}),
        (lambda: network(3), {"targets": labels, "lossf": F.cross_entropy}),
        (network, {"targets": lambda x: (x[:, :1] > 1.5).float(), "lossf": F.binary_cross_entropy_with_logits}),
    ],
    ids=["right", "noisy", "norm first", "classes", "rare"],
)
def test_watch_is_silent_on_what_was_learned(make, options) -> None:
    assert causes(loop(make(), **options)) == []


def test_watch_names_parameters_of_a_loss_that_no_optimizer_holds() -> None:
    for held in (False, True):
        model, centres = network(4), nn.Parameter(torch.randn(3, 4))
        optimizer = torch.optim.Adam([*model.parameters(), *([centres] if held else [])], lr=3e-3)
        seen = loop(model, lambda o, y, c=centres: F.cross_entropy(o @ c.T, y), labels, steps=24, optimizer=optimizer)
        assert causes(seen) == ([] if held else ["missing_from_optimizer"])


def test_watch_allows_a_network_that_judges_outputs_and_is_not_trained() -> None:
    judge = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    assert causes(loop(network(), lambda o, y: F.mse_loss(judge(o), judge(y)), steps=24)) == []


@pytest.mark.parametrize(("factor", "expected"), [(0.3, ["dominating_term"]), (1e-5, [])])
def test_a_penalty_on_weights_that_outweighs_the_rest(factor: float, expected: list[str]) -> None:
    model = network()
    seen = loop(model, lambda o, y: F.mse_loss(o, y) + factor * sum(p.square().sum() for p in model.parameters()))
    assert causes(seen) == expected


@pytest.mark.parametrize(("decay", "expected"), [(0.9999, ["ema_cold"]), (0.98, [])])
def test_an_average_that_is_too_slow_for_the_run(decay: float, expected: list[str]) -> None:
    model = network()
    average = copy.deepcopy(model).requires_grad_(False)

    def after() -> None:
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters()):
                mean.lerp_(weight, 1 - decay)
            average(torch.zeros(1, 8))

    assert causes(loop(model, steps=320, after=after)) == expected


def dice(o: Tensor, y: Tensor) -> Tensor:
    return 2 * (o.sigmoid() * y).sum() / (o.sigmoid().sum() + y.sum() + 1)


def likelihood(o: Tensor, y: Tensor) -> Tensor:
    return o.softmax(1).gather(1, y[:, None]).clamp_min(1e-6).log().mean()


def focal(o: Tensor, y: Tensor) -> Tensor:
    chosen = o.log_softmax(1).gather(1, y[:, None])
    return ((1 - chosen.exp()).square() * chosen).mean()


@pytest.mark.parametrize(
    ("lossf", "outputs", "targets", "told"),
    [(dice, 1, signs, True), (likelihood, 3, labels, True), (focal, 3, labels, False)],
    ids=["dice", "likelihood", "focal"],
)
def test_own_losses_of_the_wrong_sign(lossf: Loss, outputs: int, targets: Loss, told: bool) -> None:
    def right(o: Tensor, y: Tensor) -> Tensor:
        return -lossf(o, y)

    assert causes(loop(network(outputs), lossf, targets, told=told))[0] == "loss_sign"
    assert causes(loop(network(outputs), right, targets, told=told)) == []


@pytest.mark.parametrize(("raised", "expected"), [(True, []), (False, ["loss_sign"])])
def test_a_clipped_objective_of_a_policy(raised: bool, expected: list[str]) -> None:
    def lossf(o: Tensor, y: Tensor) -> Tensor:
        ratio = (o.log_softmax(1)[:, 0] - o.detach().log_softmax(1)[:, 0]).exp()
        least = torch.min(ratio * y[:, 0], ratio.clamp(0.8, 1.2) * y[:, 0]).mean()
        return -least if raised else least

    assert causes(loop(network(3), lossf, numbers, steps=24)) == expected


class Sampling(nn.Module):
    """A code with noise, by `sample` or `rsample`."""

    def __init__(self, keeps_gradient: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.back, self.keeps_gradient = nn.Linear(8, 3), nn.Linear(3, 1), keeps_gradient

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.distributions.Normal(self.mean(x), 0.1)
        return self.back(code.rsample() if self.keeps_gradient else code.sample()), code.loc


@pytest.mark.parametrize("keeps_gradient", [True, False])
def test_a_code_that_is_drawn_without_a_gradient(keeps_gradient: bool) -> None:
    seen = loop(Sampling(keeps_gradient), lambda o, y: F.mse_loss(o[0], y) + 1e-3 * o[1].square().mean(), steps=24)
    assert causes(seen) == ([] if keeps_gradient else ["detached_backbone"])


class Scores(nn.Module):
    """Five scores at each of seven places, as (B, 5, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 35)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(-1, 5, 7)


@pytest.mark.parametrize("transposed", [True, False])
def test_scores_that_are_reshaped_instead_of_transposed(transposed: bool) -> None:
    def lossf(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((o.transpose(1, 2) if transposed else o).reshape(-1, 5), y.flatten())

    seen = loop(Scores(), lossf, lambda x: (x[:, :7] > 0).long(), steps=24)
    assert causes(seen) == ([] if transposed else ["wrong_layout"])


@pytest.mark.parametrize("capped", [True, False])
def test_a_warm_up_that_nothing_ends(capped: bool) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 20) if capped else (n + 1) / 20)
    seen = loop(model, steps=120, optimizer=optimizer, after=warm.step)
    assert causes(seen) == ([] if capped else ["learning_rate_off_plan"])


class Mean(nn.Module):
    """One number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean()


@pytest.mark.parametrize("told", [True, False])
def test_an_output_of_no_axes(told: bool) -> None:
    torch.manual_seed(0)
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = watch(model, optimizer)
    for _ in range(24):
        target = torch.randn(())
        output = model(torch.randn(8, 4))
        loss = F.mse_loss(output, target)
        if told:
            seen.loss(loss, output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen.report()  # an error of the watch itself is a warning, and fails here
    seen.close()
