"""The most evidence a second: does each part run on this device, is it right, and how long does it take?

Every item stands alone: what goes wrong in one is written down, with the whole chain of its exception, and the next one
follows. On a CPU the same items run in small sizes, without graphs.
"""

from __future__ import annotations

import faulthandler
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.rows import note
from ris_fast import FusedAdamW
from ris_fast.benchmarks.train_step import PLANNED, trainer_of
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config
from ris_fast.gradcheck.criteria import outcome, relative, widened
from ris_fast.gradcheck.rows import backends_here
from ris_fast.kernels.registry import Operator, operators
from ris_fast.timing import alternate, conditions, copy_bandwidth, synchronize
from ris_fast.training.capture import WARM_UP, CapturedStep, CudaGraph
from ris_fast.training.precision import peak_matmul_rate
from ris_fast.training.step import network_inputs
from ris_fast.training.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEP_SCENES = 2048 if CUDA else 16
PURSUIT_SCENES = (64, 512, 2048, 4096) if CUDA else (4,)
DEAREST = 25
ITEM, ITEM_SECONDS, SPOILT = "item ", 40, 75
SMI = (
    "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,"
    "clocks_event_reasons.active"
)


def main() -> None:
    """Runs the items in a process of their own, and in another one from the next item on where an error has spoilt the
    device for the first, or an item has ended or outlasted it."""
    names, first = [name for name, _ in items()], 0
    while first < len(names):
        command = [sys.executable, "-m", "bench.gpu.smoke", str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout:
                if line.startswith(ITEM):
                    first = int(line.removeprefix(ITEM))
                else:
                    print(line, end="", flush=True)
        if child.returncode == 0:
            return
        if child.returncode != SPOILT:
            note(names[first], ok=False, error=f"its process ended with exit code {child.returncode}")
            print(f"{names[first]}: its process ended with exit code {child.returncode}", flush=True)
        first += 1


def run_from(first: int) -> None:
    """The items from this one on, in this process."""
    for number, (name, work) in list(enumerate(items()))[first:]:
        print(f"{ITEM}{number}", flush=True)
        faulthandler.dump_traceback_later(ITEM_SECONDS, exit=True)
        began = time.perf_counter()
        try:
            facts = {"ok": True, **work()}
        except Exception as error:  # whatever a first run on a new device may bring
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}", "chain": traceback.format_exc(limit=-6)}
        faulthandler.cancel_dump_traceback_later()
        note(name, **facts, seconds=round(time.perf_counter() - began, 2))
        print(f"{name}: {'ok' if facts['ok'] else facts['error']}", flush=True)
        if not facts["ok"] and spoilt():
            sys.exit(SPOILT)


def spoilt() -> bool:
    """Whether the device refuses this process, as after an access to memory that is not there."""
    try:
        synchronize(DEVICE)
    except RuntimeError:
        return True
    return False


def items() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "machine", machine
    yield "ceilings", ceilings
    for operator in operators():
        yield f"operator {operator.name}", lambda operator=operator: right(operator)
    yield "FusedAdamW against its reference", optimizer_against_reference
    yield "FusedAdamW replayed", optimizer_replayed
    yield f"captured step, {STEP_SCENES} scenes", captured_step
    for scenes in PURSUIT_SCENES:
        yield f"pursuit, {scenes} scenes", lambda scenes=scenes: pursuit(scenes)
    yield f"dearest kernels of a step, {STEP_SCENES} scenes", dearest_kernels


def machine() -> dict[str, Any]:
    return {"conditions": conditions(DEVICE), "nvidia_smi": smi()}


def smi() -> str:
    """Driver, clocks and what limits them; older drivers have another name for the last."""
    for asked in (SMI, SMI.replace("clocks_event_reasons", "clocks_throttle_reasons")):
        try:
            done = subprocess.run(
                ["nvidia-smi", "--format=csv,noheader", f"--query-gpu={asked}"], capture_output=True, text=True
            )
        except OSError:
            return "no nvidia-smi"
        if done.returncode == 0:
            return done.stdout.strip()
    return "nvidia-smi failed"


def ceilings() -> dict[str, Any]:
    return {
        "copy_GB_per_s": copy_bandwidth(DEVICE) * 1e-9,
        **{f"{name}_TFLOP_per_s": peak_matmul_rate(DEVICE, name, 0.5) * 1e-12 for name in ("fp32", "bf16")},
    }


def right(operator: Operator) -> dict[str, Any]:
    """The kernel of this device on the first sample in float32, against the float64 definition."""
    name, run = list(backends_here(operator, str(DEVICE)).items() or {"as registered": operator.call}.items())[-1]
    args = operator.samples[0].make(DEVICE, operator.dtypes[0])
    want = outcome(operator, operator.reference, widened(args))
    error = relative(outcome(operator, run, args), want)
    eager = relative(outcome(operator, operator.reference, args), want)
    if not error <= max(10.0 * eager, 1e-5):
        raise ArithmeticError(f"{name}: relative error {error:.1e}, where plain torch makes {eager:.1e}")
    return {"backend": name, "sample": operator.samples[0].name, "error": error, "plain_torch_error": eager}


def optimizer(backend: str = "auto") -> tuple[list[nn.Parameter], FusedAdamW]:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
        for shape in ((64, 33), (1,), (300, 301), (9000,))
    ]
    options = dict(max_grad_norm=1.0, ema_decay=0.9, ema_warmup=True, clear_grads=True)
    return params, FusedAdamW(params, lr=1e-2, backend=backend, **options)


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator).to(DEVICE)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)


def stepped(count: int, backend: str = "auto", replayed: bool = False) -> tuple[Tensor, str]:
    """The weights after so many steps, and the implementation that made them."""
    params, ours = optimizer(backend)
    give_gradients(params, 0)
    ours.step()
    work = ours.step
    if replayed:
        give_gradients(params, 1)
        graph = CudaGraph(ours.step)  # runs nothing
        work = lambda: (ours.sync_hyperparameters(), graph.replay(), ours.count_replay())  # noqa: E731
    for step in range(1, count):
        give_gradients(params, step)
        work()
    return torch.cat([parameter.detach().flatten() for parameter in params]), ours.backend


def optimizer_against_reference() -> dict[str, Any]:
    (found, backend), (want, _) = stepped(20), stepped(20, "reference")
    error = relative([found], [want])
    if not error < 1e-5:
        raise ArithmeticError(f"{backend}: relative error {error:.1e} of the weights after 20 steps")
    return {"backend": backend, "error": error}


def optimizer_replayed() -> dict[str, Any]:
    if not CUDA:
        return {"replayed": False}
    (eager, _), (replayed, _) = stepped(20), stepped(20, replayed=True)
    if not torch.equal(eager, replayed):
        raise ArithmeticError(f"replay differs from eager by {relative([replayed], [eager]):.1e}")
    return {"replayed": True, "bit_for_bit": True}


def default() -> Config:
    config = load_config(preset="full" if CUDA else "laptop")
    return replace(config, training=replace(config.training, device=str(DEVICE)))


def warm_step() -> tuple[Trainer, CapturedStep, list[Tensor]]:
    """A trainer of the default preset, uncompiled, and its step with a graph where one is possible."""
    trainer = trainer_of(default(), STEP_SCENES, False)
    trainer.model.train()
    captured = CapturedStep(trainer.step, trainer.source, trainer.config)
    index = [torch.arange(STEP_SCENES, device=trainer.source.index_device)]
    for _ in range(12 + WARM_UP):  # the first ones are watched closely, which no graph does
        captured(index, PLANNED)
    return trainer, captured, index


def captured_step() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a refusal is in what is returned
        _, captured, index = warm_step()
        found = alternate({"step": lambda: captured(index, PLANNED)}, DEVICE, quiet=20, seconds=5.0)["step"]
    return {
        "captured": captured.recording is not None,
        "refused": captured.refused,
        "step_ms": found["s"] * 1e3,
        "host_ms": found["host_s"] * 1e3,
        "scenes_per_s": STEP_SCENES / found["s"],
    }


def pursuit(scenes: int) -> dict[str, Any]:
    """The features of the default network alone: kernel by kernel, and as a graph where there are graphs."""
    trainer = trainer_of(default(), scenes, False)
    batch = trainer.source.batch("train", torch.arange(scenes, device=trainer.source.index_device))
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: trainer.model.features(*network_inputs(batch))}
    for _ in range(3):
        calls["eager"]()
    if CUDA:
        calls["graph"] = CudaGraph(calls["eager"]).replay
    found = alternate(calls, DEVICE, quiet=10, seconds=2.0)
    return {f"{name}_ms": each["s"] * 1e3 for name, each in found.items()}


def dearest_kernels() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        _, captured, index = warm_step()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * CUDA, acc_events=True) as profiler:
        for _ in range(3):
            captured(index, PLANNED)
    spent = {
        event.key: (event.self_device_time_total if CUDA else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    dearest = sorted(spent.items(), key=lambda each: -each[1][0])[:DEAREST]
    return {"kernels": [{"name": name[:120], "us": us / 3, "count": count / 3} for name, (us, count) in dearest]}


if __name__ == "__main__":
    run_from(int(sys.argv[1])) if len(sys.argv) > 1 else main()
