"""What people do to an optimizer, its parameters and its gradients between steps: one table, torch.optim.AdamW beside
FusedAdamW.

A row of SAME is run with both and gives the same weights, gradients (None or not), step counts and kept tensors after
every step. A row of REFUSED is something that flat buffers cannot follow: FusedAdamW raises, with these words.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.a, self.b, self.c = (
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 3), (5,), (2, 4))
        )

    def forward(self) -> Tensor:
        return self.a


class Run:
    """A model and one kind of optimizer. `seen`: what there was after every step; `kept`: tensors that a habit holds on
    to."""

    def __init__(self, kind: type, **options: Any) -> None:
        self.kind, self.model = kind, Model()
        self.a, self.b, self.c = self.model.a, self.model.b, self.model.c
        self.optimizer: Any = kind(self.model.parameters(), lr=0.1, weight_decay=0.1, **options)
        self.watched: list[Tensor] = list(self.model.parameters())
        self.seen: list[Any] = []
        self.kept: list[Tensor] = []

    @property
    def params(self) -> list[Tensor]:
        return self.optimizer.param_groups[0]["params"]

    def backward(self, *params: Tensor, scale: float = 1.0, **options: Any) -> None:
        sum(scale * (p - 0.3).square().sum() for p in params or self.watched).backward(**options)

    def step(self) -> None:
        self.optimizer.step()
        self.look()

    def look(self) -> None:
        for p in self.watched:
            grad, state = p.grad, self.optimizer.state.get(p, {})
            self.seen += [
                p.detach().clone(),
                None if grad is None else grad.detach().clone(),
                float(state["step"]) if state else None,
            ]

    def train(self, *params: Tensor, steps: int = 2) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward(*params)
            self.step()


SAME: dict[str, Callable[[Run], None]] = {}
REFUSED: dict[str, tuple[Callable[[Run], None], str]] = {}


def same(habit: Callable[[Run], None]) -> Callable[[Run], None]:
    SAME[habit.__name__] = habit
    return habit


def refused(words: str) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    def row(habit: Callable[[Run], None]) -> Callable[[Run], None]:
        REFUSED[habit.__name__] = (habit, words)
        return habit

    return row


@pytest.mark.parametrize("habit", SAME)
def test_fused_adamw_matches_torch_under_a_habit(habit: str) -> None:
    ours, plain = Run(FusedAdamW), Run(torch.optim.AdamW)
    for run in (ours, plain):
        SAME[habit](run)
    assert len(ours.seen) == len(plain.seen) > 0 and len(ours.kept) == len(plain.kept)
    for one, other in zip([*ours.seen, *ours.kept], [*plain.seen, *plain.kept], strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            assert one == other


@pytest.mark.parametrize("habit", REFUSED)
def test_fused_adamw_refuses_a_habit_by_a_clear_error(habit: str) -> None:
    act, words = REFUSED[habit]
    with pytest.raises((ValueError, RuntimeError), match=words):
        act(Run(FusedAdamW))


# ---- which gradients are there
# -------------------------------------------------------------------------------------------


@same
def a_parameter_is_used_once(run: Run) -> None:
    run.train(run.a, run.b, steps=1)
    run.train(run.a, steps=3)


@same
def model_zero_grad(run: Run) -> None:
    run.train(steps=1)
    for _ in range(3):
        run.model.zero_grad()
        run.backward(run.a)
        run.step()


@same
def gradients_are_zeroed_in_place(run: Run) -> None:
    for params in ((run.a, run.b), (run.a,), (run.a, run.c)):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(*params)
        run.step()


@same
def a_parameter_is_frozen_and_thawed(run: Run) -> None:
    run.train()
    run.a.requires_grad_(False)
    run.train(run.a, run.b)
    run.a.requires_grad_(True)
    run.train()


@same
def frozen_without_clearing(run: Run) -> None:
    run.train()
    run.a.requires_grad_(False)
    run.backward()
    run.step()


@same
def everything_is_frozen(run: Run) -> None:
    run.train()
    run.model.requires_grad_(False)
    run.optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient") if run.kind is FusedAdamW else nullcontext():
        run.step()


@same
def one_gradient_is_set_to_none(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        run.b.grad = None
        run.step()


@same
def backward_names_its_inputs(run: Run) -> None:
    for inputs in ([run.a], [run.b, run.c], [run.a]):
        run.optimizer.zero_grad()
        run.backward(inputs=inputs)
        run.step()


@same
def experts_take_turns(run: Run) -> None:
    for n in range(9):
        run.train((run.a, run.b, run.c)[n % 3], steps=1)


@same
def gradients_are_never_cleared(run: Run) -> None:
    for _ in range(3):
        run.backward()
        run.step()


@same
def micro_batches(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward(scale=0.5), run.backward(run.a), run.backward(run.c, scale=2.0)
        run.step()


@same
def step_twice(run: Run) -> None:
    run.train()
    run.step()


# ---- what is done to gradients
# -------------------------------------------------------------------------------------------


@same
def gradients_are_kept(run: Run) -> None:
    for n in (1, 2, 3):
        run.optimizer.zero_grad()
        (n * run.b.sum()).backward()
        run.step()
        run.kept.append(run.b.grad)
    run.kept[0].mul_(10)


@same
def gradients_are_kept_by_a_closure(run: Run) -> None:
    def closure() -> Tensor:
        run.optimizer.zero_grad()
        run.backward()
        run.kept.append(run.a.grad)
        return run.a.sum()

    for _ in range(3):
        run.kept.append(run.optimizer.step(closure).detach().clone())
        run.look()


@same
def gradients_are_edited_in_place(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        run.a.grad.mul_(0.5), run.b.grad.clamp_(-0.1, 0.1), run.c.grad.data.add_(1.0)
        run.a.grad[1].zero_()
        run.step()


@same
def gradients_are_clipped_by_torch(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        nn.utils.clip_grad_norm_(run.watched, 0.1)
        nn.utils.clip_grad_value_(run.watched, 0.01)
        run.step()


@same
def gradients_are_replaced(run: Run) -> None:
    shared = torch.linspace(-1, 1, 9)
    for grad in (
        shared.view(3, 3),
        shared.view(3, 3).t(),
        torch.ones(()).expand(3, 3),
        torch.arange(18.0).view(3, 6)[:, ::2],
    ):
        run.optimizer.zero_grad()
        run.a.grad, run.b.grad = grad, shared[2:7]
        run.step()
    run.kept.append(shared)


@same
def gradients_with_a_graph(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad(set_to_none=False)
        loss = sum(p.pow(3).sum() for p in run.watched)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice, once a process
            loss.backward(create_graph=True)
        sum(p.grad.square().sum() for p in run.watched).backward()
        run.step()
        for p in run.watched:
            p.grad = p.grad.detach()


@same
def conjugate_and_negative_gradients(run: Run) -> None:
    z = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    run.optimizer = run.kind([z, run.b], lr=0.1)
    run.watched = [z, run.b]
    for n in range(3):
        lazy = torch.tensor([1 + 1j, 2 - 5j]).mul(n + 1).conj()
        z.grad = lazy if run.kind is FusedAdamW else lazy.resolve_conj()  # on which torch's raises
        run.b.grad = torch.linspace(-1, 1, 5).add(0.3j).conj().imag * (n + 1)
        run.step()


@same
def hooks_on_gradients(run: Run) -> None:
    run.a.register_hook(lambda g: g * 0.1)
    run.b.register_hook(lambda g: None)
    run.c.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad + 1.0))
    run.train(steps=3)


@same
def hooks_around_the_step(run: Run) -> None:
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: setattr(run.a, "grad", run.a.grad.sign()))
    run.optimizer.register_step_post_hook(lambda optimizer, *_: setattr(run.b, "data", run.b.data.clamp(-0.5, 0.5)))
    run.train(steps=3)


@same
def a_step_within_backward(run: Run) -> None:
    each = {p: run.kind([p], lr=0.1) for p in run.watched}

    def hook(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in run.watched:
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        run.backward(run.a, run.b)
        run.look()


# ---- what is done to weights
# ---------------------------------------------------------------------------------------------


@same
def weights_are_edited_in_place(run: Run) -> None:
    for _ in range(3):
        run.train(steps=1)
        with torch.no_grad():
            run.a.clamp_(-0.5, 0.5)
            nn.init.constant_(run.b, 0.7)
        run.c.data.mul_(0.5)


@same
def weights_are_loaded(run: Run) -> None:
    first = copy.deepcopy(run.model.state_dict())
    run.train()
    run.model.load_state_dict(first)
    run.train()


@same
def weights_are_loaded_by_assignment(run: Run) -> None:
    """The model then has Parameters that no optimizer holds: it stands still with either."""
    run.train()
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    run.optimizer.zero_grad()
    run.backward(*run.model.parameters())
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient") if run.kind is FusedAdamW else nullcontext():
        run.step()
    run.kept += [p.detach() for p in run.model.parameters()]


@same
def data_is_assigned(run: Run) -> None:
    for _ in range(3):
        run.train(steps=1)
        run.a.data = run.a.data * 0.5
        run.b.data = run.b.data.clamp(-0.1, 0.1)


@same
def data_is_assigned_before_the_first_step(run: Run) -> None:
    run.a.data = torch.ones(3, 3)
    run.train()


@same
def the_old_data_are_kept(run: Run) -> None:
    run.train()
    run.kept.append(run.a.data)
    run.a.data = run.a.data * 0.5
    run.train()


@same
def data_are_swapped_and_put_back(run: Run) -> None:
    run.train()
    raw = [p.data for p in run.watched]
    for p in run.watched:
        p.data = torch.zeros_like(p)
    run.kept += [p.detach().clone() for p in run.watched]
    for p, data in zip(run.watched, raw, strict=True):
        p.data = data
    run.train()
    run.kept += raw


@same
def data_are_transposed(run: Run) -> None:
    run.train()
    run.a.data = run.a.data.t().contiguous()
    run.train()
    run.c.data = run.c.data.as_strided((2, 4), (1, 2)).clone()
    run.train()


@same
def a_vector_becomes_the_parameters(run: Run) -> None:
    run.train()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(run.watched).detach() * 0.9, run.watched)
    run.train()


@same
def tensors_are_swapped(run: Run) -> None:
    run.train()
    other = nn.Parameter(torch.full((3, 3), 0.2))
    run.optimizer.zero_grad()
    torch.utils.swap_tensors(run.a, other)
    run.train()
    run.kept.append(other.detach())


@same
def the_memory_format_changes(run: Run) -> None:
    w = nn.Parameter(torch.arange(48.0).view(2, 3, 2, 4) / 50)
    run.optimizer, run.watched = run.kind([w, run.b], lr=0.1), [w, run.b]
    run.train()
    w.data = w.data.to(memory_format=torch.channels_last)
    run.train()
    assert w.is_contiguous(memory_format=torch.channels_last)


@same
def sharpness_aware_steps(run: Run) -> None:
    for _ in range(3):
        run.optimizer.zero_grad()
        run.backward()
        raw = [p.data.clone() for p in run.watched]
        with torch.no_grad():
            for p in run.watched:
                p.add_(p.grad, alpha=0.05)
        run.optimizer.zero_grad()
        run.backward()
        for p, data in zip(run.watched, raw, strict=True):
            p.data = data
        del raw, data
        run.step()


@same
def pruning_by_a_mask(run: Run) -> None:
    from torch.nn.utils import prune

    run.train()
    prune.custom_from_mask(run.model, "a", torch.eye(3))
    for _ in range(3):
        run.optimizer.zero_grad()
        run.model().square().sum().backward()
        run.step()


@same
def parametrization(run: Run) -> None:
    run.train()
    nn.utils.parametrizations.spectral_norm(run.model, "a")
    for _ in range(2):
        run.optimizer.zero_grad()
        torch.manual_seed(0)
        run.model().sum().backward()
        run.step()


# ---- what is done to param_groups
# ----------------------------------------------------------------------------------------


@same
def a_parameter_is_replaced(run: Run) -> None:
    run.train()
    new = nn.Parameter(torch.ones(5))
    run.watched.append(new)
    run.params[1] = new
    run.train(steps=3)


@same
def a_parameter_is_appended(run: Run) -> None:
    run.train()
    new = nn.Parameter(torch.ones(7))
    run.watched.append(new)
    run.params.append(new)
    run.train(steps=3)


@same
def a_parameter_is_appended_before_the_first_step(run: Run) -> None:
    new = nn.Parameter(torch.ones(7))
    run.watched.append(new)
    run.params.insert(0, new)
    run.optimizer.zero_grad(set_to_none=False)
    run.train(steps=3)


@same
def a_parameter_is_removed_and_comes_back(run: Run) -> None:
    run.train()
    gone = run.params.pop(0)
    run.train()
    run.params.append(gone)
    run.train()


@same
def parameters_are_reordered(run: Run) -> None:
    run.train()
    run.params.reverse()
    run.train()


@same
def groups_are_added_and_parameters_move_between_them(run: Run) -> None:
    run.train()
    new = nn.Parameter(torch.ones(2))
    run.watched.append(new)
    run.optimizer.add_param_group({"params": [new], "lr": 0.5})
    run.train()
    run.optimizer.param_groups[1]["params"].insert(0, run.params.pop())
    run.train()
    del run.optimizer.param_groups[1]
    run.train()


@same
def the_list_of_groups_is_replaced(run: Run) -> None:
    run.train()
    whole = run.optimizer.param_groups[0]
    run.optimizer.param_groups = [
        whole | {"params": [run.c, run.a], "lr": 0.01},
        whole | {"params": [run.b], "weight_decay": 0.0},
    ]
    run.train()


@same
def master_weights_as_in_deepspeed(run: Run) -> None:
    """A wrapper puts one flat float32 master in the place of the parameters, and gives it its gradient."""
    run.watched = []
    held = list(run.params)
    master = nn.Parameter(nn.utils.parameters_to_vector(held).detach().clone())
    run.params[:] = [master]
    run.watched = [master]
    for _ in range(3):
        for p in held:
            p.grad = None
        sum((p - 0.3).square().sum() for p in held).backward()
        master.grad = torch.cat([p.grad.flatten() for p in held])
        run.step()
        for p, part in zip(held, master.detach().split([p.numel() for p in held]), strict=True):
            p.data.copy_(part.view_as(p))
        master.grad = None
    run.kept += [p.detach() for p in held]


@same
def hyperparameters_are_set(run: Run) -> None:
    run.train()
    run.optimizer.param_groups[0].update(lr=0.01, weight_decay=0.5, betas=(0.5, 0.7), eps=1e-3)
    run.train()
    run.optimizer.param_groups[0]["maximize"] = True
    run.train()


# ---- what is done to the state
# -------------------------------------------------------------------------------------------


@same
def the_state_is_cleared(run: Run) -> None:
    run.train()
    run.optimizer.state.clear()
    run.train()
    run.optimizer.state = defaultdict(dict)
    run.train()


@same
def the_state_of_one_parameter_is_dropped(run: Run) -> None:
    run.train()
    del run.optimizer.state[run.a]
    run.optimizer.state[run.b] = {}
    run.train()


@same
def moments_are_edited(run: Run) -> None:
    run.train()
    run.optimizer.state[run.a]["exp_avg"].zero_()
    run.optimizer.state[run.b]["exp_avg_sq"] = torch.full((5,), 0.1)
    run.optimizer.state[run.c]["step"] = torch.tensor(0.0)
    run.optimizer.state[run.c]["mine"] = "a note"
    run.train()
    assert run.optimizer.state[run.c]["mine"] == "a note"


@same
def the_state_is_saved_and_loaded(run: Run) -> None:
    run.train(run.a, run.b)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.train()
    run.optimizer.load_state_dict(saved)
    run.train()


@same
def the_state_of_adam_is_loaded(run: Run) -> None:
    """torch.optim.AdamW goes on decaying decoupled."""
    adam = torch.optim.Adam(run.watched, lr=0.1, weight_decay=0.1)
    run.backward()
    adam.step()
    run.optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    run.train()
    run.kept.append(torch.tensor([group["decoupled_weight_decay"] for group in run.optimizer.param_groups]))


@same
def a_parameter_is_appended_and_a_state_with_it_loaded(run: Run) -> None:
    run.train()
    new, saved = nn.Parameter(torch.ones(7)), copy.deepcopy(run.optimizer.state_dict())
    run.watched.append(new)
    run.params.append(new)
    saved["param_groups"][0]["params"].append(3)
    saved["state"][3] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(7), "exp_avg_sq": torch.ones(7)}
    run.optimizer.load_state_dict(saved)
    run.train()


# ---- several optimizers, and wrappers
# ------------------------------------------------------------------------------------


@same
def two_optimizers_share_a_model(run: Run) -> None:
    run.optimizer = run.kind([run.a, run.c], lr=0.1)
    other = run.kind([run.b], lr=0.05)
    for n in range(4):
        run.model.zero_grad()
        run.backward()
        (run.optimizer if n % 2 else other).step()
        run.look()


@same
def another_optimizer_holds_the_same_parameters(run: Run) -> None:
    other = torch.optim.SGD(run.watched, lr=0.1)
    for _ in range(3):
        run.train(steps=1)
        other.step()


@same
def an_optimizer_is_built_anew(run: Run) -> None:
    run.train()
    run.optimizer = run.kind(run.model.parameters(), lr=0.01)
    run.train()


class Wrapper:
    """As accelerate's: forwards everything, skips steps while gradients are accumulated."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.calls = optimizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        if self.calls % 2 == 0:
            self.optimizer.zero_grad() if set_to_none is None else self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


@same
def a_wrapper_as_in_accelerate(run: Run) -> None:
    run.optimizer = Wrapper(run.optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer.optimizer, 0.5)
    for _ in range(6):
        run.backward()
        run.step()
        run.optimizer.zero_grad()
        scheduler.step() if run.optimizer.calls % 2 == 0 else None


@same
def lookahead(run: Run) -> None:
    slow = [p.detach().clone() for p in run.watched]
    for n in range(6):
        run.train(steps=1)
        if n % 3 == 2:
            for p, behind in zip(run.watched, slow, strict=True):
                behind.lerp_(p.data, 0.5)
                p.data.copy_(behind)


# ---- inside `with optimizer.ema()`
# ----------------------------------------------------------------------------------------

INSIDE: dict[str, Callable[[Run], Any]] = {
    "cast there and back": lambda run: run.model.half().float(),
    "widened": lambda run: run.model.double().float(),
    "cast": lambda run: run.model.half(),
    "data cloned": lambda run: [setattr(p, "data", p.data.clone()) for p in run.watched],
    "data held by another": lambda run: [
        run.kept.append(p.data.clone()) or setattr(p, "data", run.kept[-1]) for p in run.watched
    ],
    "data transposed": lambda run: setattr(run.a, "data", run.a.data.t().contiguous()),
    "a vector": lambda run: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(run.watched).detach().clone(), run.watched
    ),
    "swapped": lambda run: torch.utils.swap_tensors(run.a, nn.Parameter(torch.ones(3, 3))),
    "swapped for one without values": lambda run: torch.utils.swap_tensors(
        run.a, nn.Parameter(torch.ones(3, 3, device="meta"))
    ),
    "in inference mode": torch.inference_mode()(lambda run: run.model.double()),
}


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("act", INSIDE)
def test_fused_adamw_ema_block_gives_raw_weights_back(act: str, clear: bool) -> None:
    runs = [Run(FusedAdamW, ema_decay=0.9, clear_grads=clear) for _ in range(2)]
    for run, does in zip(runs, (INSIDE[act], lambda run: None), strict=True):
        for _ in range(2):
            run.backward()
            run.step()
            with run.optimizer.ema():
                does(run)
            run.look()
            run.optimizer.zero_grad(set_to_none=False)
    weights = [run.seen[::3] for run in runs]  # gradients leave with a tensor that is swapped, and casting rounds them
    assert all(map(torch.equal, *weights)) and runs[0].seen[2::3] == runs[1].seen[2::3]
    assert all(
        one.dtype == torch.float32 and torch.equal(one, other)
        for one, other in zip(runs[0].watched, runs[1].watched, strict=True)
    )


@pytest.mark.parametrize("who, act", [
    ("add_param_group", lambda run: run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
    ("rebind", lambda run: run.optimizer.rebind()),
    ("load_state_dict", lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict())),
    ("load_extra_state", lambda run: run.optimizer.load_extra_state(run.optimizer.extra_state())),
    ("load_checkpoint_tensors", lambda run: run.optimizer.load_checkpoint_tensors(run.optimizer.checkpoint_tensors())),
    ("accumulate", lambda run: (run.params.append(nn.Parameter(torch.ones(2))), run.optimizer.accumulate([None] * 3))),
])  # fmt: skip
def test_fused_adamw_refuses_a_new_layout_inside_ema(who: str, act: Callable[[Run], Any]) -> None:
    run = Run(FusedAdamW, ema_decay=0.9)
    run.train()
    raw = [p.detach().clone() for p in run.watched]
    with pytest.raises(RuntimeError, match=f"FusedAdamW.{who}: called inside"), run.optimizer.ema():
        act(run)
    assert all(map(torch.equal, run.watched, raw)) and len(run.optimizer.param_groups) == 1
    run.train()  # and the optimizer is not locked


def test_fused_adamw_follows_lists_edited_inside_ema() -> None:
    run, new = Run(FusedAdamW, ema_decay=0.9), nn.Parameter(torch.ones(2))
    run.train()
    raw = [p.detach().clone() for p in run.watched]
    with run.optimizer.ema():
        run.params[:] = [run.b, new]
    assert all(map(torch.equal, run.watched, raw))
    run.watched.append(new)
    run.train()
    assert torch.equal(run.a, raw[0]) and not torch.equal(run.b, raw[1]) and not torch.equal(new, torch.ones(2))


@pytest.mark.parametrize("zeroed", ["after", "before"])
def test_fused_adamw_trains_on_after_a_cast_there_and_back(zeroed: str) -> None:
    """Casting a module points `.grad.data` away from the buffer, and the gradient stays the same object."""
    ours, plain = Run(FusedAdamW, clear_grads=True), Run(torch.optim.AdamW)
    for run in (ours, plain):
        for _ in range(3):
            run.backward()
            run.step()
            if zeroed == "after":
                run.backward()
            run.optimizer.zero_grad(set_to_none=False)
            if zeroed == "after":
                run.backward()
            run.model.double().float()
            if zeroed == "after":
                run.optimizer.zero_grad(set_to_none=False)
    for one, other in zip(ours.watched, plain.watched, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---- refused
# -------------------------------------------------------------------------------------------------------------


@refused("parameter group0.0 is in memory shared between processes.*Hogwild")
def share_memory_before(run: Run) -> None:
    FusedAdamW(Model().share_memory().parameters())


@refused("parameter group0.0 is in memory shared between processes")
def share_memory_before_the_first_step(run: Run) -> None:
    run.model.share_memory()
    run.train()


@refused("parameter group0.0 is in memory shared between processes")
def share_memory_after_a_step(run: Run) -> None:
    run.train()
    run.model.share_memory()
    run.train()


@refused(r"group0.0 of shape \(5,\) has strides \(0,\): several elements are one place in memory")
def an_expanded_parameter(run: Run) -> None:
    FusedAdamW([nn.Parameter(torch.ones(1).expand(5))])


@refused("group0.0 of shape")
def overlapping_windows(run: Run) -> None:
    FusedAdamW([nn.Parameter(torch.arange(7.0).unfold(0, 3, 1))])


@refused("group0.3 of shape.*several elements are one place")
def an_expanded_parameter_is_appended(run: Run) -> None:
    run.params.append(nn.Parameter(torch.ones(1).expand(5)))
    run.train()


@refused("parameter group0.0 has no shape yet.*dry run")
def a_lazy_layer(run: Run) -> None:
    FusedAdamW(nn.LazyLinear(3).parameters())


@refused("parameter group0.0 is on the meta device.*to_empty")
def a_model_without_values(run: Run) -> None:
    FusedAdamW(nn.Linear(2, 2, device="meta").parameters())


@refused("parameter group0.0 is in memory shared between processes")
def weights_are_sent_to_another_process(run: Run) -> None:
    run.train()
    torch.multiprocessing.get_context("spawn").SimpleQueue().put(run.model.state_dict())
    run.train()


@refused("1 of 3 parameters .first: group0.0. left the flat buffer.*another tensor holds too")
def data_that_somebody_else_holds(run: Run) -> None:
    run.train()
    held = torch.ones(3, 3)
    run.a.data = held
    run.train()


@refused("left the flat buffer")
def the_model_changes_its_dtype(run: Run) -> None:
    run.train()
    run.model.double()
    run.train()


@refused("left the flat buffer.*given to another FusedAdamW")
def two_of_them_hold_the_same_parameters(run: Run) -> None:
    other = FusedAdamW(run.model.parameters())
    for _ in range(3):
        run.train(steps=1)
        other.step()


@refused("param_groups hold no parameter any more")
def every_parameter_is_removed(run: Run) -> None:
    run.params.clear()
    run.optimizer.step()


@refused("amsgrad=True is not supported")
def amsgrad_is_switched_on(run: Run) -> None:
    run.train()
    run.optimizer.param_groups[0]["amsgrad"] = True
    run.train()


@refused("two parameters have the same name|given twice")
def a_parameter_is_appended_twice(run: Run) -> None:
    run.params.append(run.a)
    run.train()
