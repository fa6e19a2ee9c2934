"""A watched loop that is compiled, exported, copied, saved or sent to another process works as it does without."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast.health import watch
from ris_fast.health.watch.eager import eager_hook
from tests.health.watch.loops import network, train

STEPS, EVERY = 24, 3  # steps that are looked at, and steps that are not, beyond dynamo's limit of 8 graphs


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, call: Callable[..., Any]) -> Callable[[Tensor], None]:
    def step(x: Tensor) -> None:
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def graphs(kind: str, watched: bool) -> list[int]:
    """How many graphs there are after each step."""
    torch._dynamo.reset()
    count: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        count.append(graph)
        return graph.forward

    def compiled(function: Any, **options: Any) -> Any:
        return torch.compile(function, backend=backend, **options)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer, every=EVERY) if watched else None
    step, around = loop(model, optimizer, model), nullcontext
    if kind == "model":
        step = loop(model, optimizer, compiled(model, fullgraph=True))
    elif kind == "step":
        optimizer.step = compiled(optimizer.step)
    elif kind == "loop":
        step = compiled(step)
    elif kind == "backward":
        finish = compiled(lambda loss: (loss.backward(), optimizer.step(), optimizer.zero_grad()))
        step = lambda x: finish(model(x).square().mean())  # noqa: E731
    elif kind == "autograd":
        around = lambda: torch._dynamo.compiled_autograd._enable(compiled(None, fullgraph=True))  # noqa: E731
    said = []
    for _ in range(STEPS):
        with around():
            step(torch.randn(4, 8))
        said.append(len(count))
    assert seen is None or seen.report() == []
    return said


@pytest.mark.parametrize("kind", ["model", "step", "loop", "backward"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_watch_adds_no_graph_to_a_compiled(kind: str) -> None:
    assert graphs(kind, watched=True) == graphs(kind, watched=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, of what it compiles
def test_watch_leaves_compiled_autograd_whole() -> None:
    """A graph is made anew for each set of hooks, of which there are few."""
    without, with_watch = graphs("autograd", watched=False), graphs("autograd", watched=True)
    assert with_watch[-1] - without[-1] <= 6 and with_watch[14] == with_watch[-1]


def test_eager_hook_is_left_out_of_graphs_and_called_beside_them() -> None:
    heard = []
    model = network()
    model[0].register_forward_hook(eager_hook(lambda *_: heard.append(1)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2, 8)), network()(torch.ones(2, 8))) and not heard
    model(torch.ones(2, 8))
    assert heard == [1]


# ---- copies ---------------------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    train(model, optimizer, 3)
    return model, optimizer, seen


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda value: pickle.loads(pickle.dumps(value))])
def test_watched_models_and_optimizers_can_be_copied(copied: Callable[[Any], Any]) -> None:
    model, optimizer, seen = trained()
    average, inputs = copied(model), torch.randn(2, 8)
    assert torch.equal(average(inputs), model(inputs))
    steps = seen.steps
    both = copied((model, optimizer))
    train(both[0], both[1], 2)
    torch.optim.swa_utils.AveragedModel(model).update_parameters(model)
    assert seen.steps == steps and seen.report() == []
    train(model, optimizer, 9)
    assert seen.report() == [] and seen.steps == 12


def test_watched_models_can_be_traced_and_exported() -> None:
    model, optimizer, seen = trained()
    inputs = torch.randn(2, 8)
    for other in (
        torch.jit.trace(model, inputs),
        torch.export.export(model, (inputs,)).module(),
        torch.fx.symbolic_trace(model),
        lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
        lambda x: torch.vmap(model)(x),
    ):
        assert torch.allclose(other(inputs), model(inputs))
    train(model, optimizer, 9)
    assert seen.report() == []


def answer(model: nn.Module, pipe: Any) -> None:
    pipe.send(model(torch.ones(1, 8)).tolist())


@pytest.mark.slow
def test_watched_models_can_be_sent_to_a_spawned_process() -> None:
    model, _, _ = trained()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(model, theirs))
    process.start()
    assert ours.poll(60) and ours.recv() == model(torch.ones(1, 8)).tolist()
    process.join()


# ---- unusual loops --------------------------------------------------------------------------------------------------


def test_several_watches_of_one_model_agree() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    watches = [watch(model, optimizer) for _ in range(3)]
    train(model, optimizer, 6)
    watches[0].close()
    train(model, optimizer, 6)
    assert [seen.report() for seen in watches[1:]] == [[], []] and [seen.steps for seen in watches] == [6, 12, 12]


def test_watch_takes_optimizers_that_step_in_backward() -> None:
    model = network()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=1e-2) for parameter in model.parameters()}
    seen = watch(model, list(optimizers.values()))

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(12):
        model(torch.randn(32, 8)).square().mean().backward()
    assert seen.report() == [] and seen.steps == 12


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_watch_takes_steps_without_gradients_of_their_own(around: Callable[..., Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()
        with around():
            optimizer.step()
    assert seen.report() == []


def test_watch_takes_a_loop_in_threads() -> None:
    """Replicas of one model in threads, as nn.DataParallel has them, each with a backward of its own."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = watch(model, optimizer)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(12):
            optimizer.zero_grad()
            losses = pool.map(lambda x: model(x).square().mean(), torch.randn(2, 16, 8))
            sum(losses).backward()
            optimizer.step()
    assert seen.report() == []
