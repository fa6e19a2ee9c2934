"""FusedAdamW under torch.compile, DistributedDataParallel, Lightning and Accelerate gives what torch's AdamW gives
there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(5))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))


def build(kind: type, model: nn.Module) -> Any:
    """The same AdamW, clipped at 0.1: by the optimizer itself, or by the caller."""
    return kind(model.parameters(), lr=1e-2, **({"max_grad_norm": 0.1} if kind is FusedAdamW else {}))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def plain_loop(kind: type, model: nn.Module, run: Any = None, batches: int = 6) -> nn.Module:
    optimizer, run = build(kind, model), run or model
    for step in range(batches):
        x = X[4 * step : 4 * step + 4]
        (run(x) - x).square().mean().backward()
        if kind is not FusedAdamW:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_adamw_under_a_compiled_model(when: str) -> None:
    """Optimizer built before or after compilation; no recompilation from step to step."""
    torch.compiler.reset()
    model = make()
    run = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    if when == "after":
        run(X[:4]).sum().backward()
        model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        plain_loop(FusedAdamW, model, run)
    assert same(model, plain_loop(torch.optim.AdamW, make()))


DDP = """
import sys
import torch, torch.distributed as dist
from test_fused_adamw_frameworks import FusedAdamW, X, make, plain_loop, same
rank, port, as_view = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.set_num_threads(1)
results = []
for kind in (FusedAdamW, torch.optim.AdamW):
    model = make()
    net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    results.append(plain_loop(kind, model, lambda x: net(x + rank)))
weights = torch.cat([p.detach().flatten() for p in results[0].parameters()])
other = weights.clone()
dist.broadcast(other, 0)
assert torch.equal(other, weights), "ranks differ"
assert same(*results)
dist.destroy_process_group()
print("agrees")
"""


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("as_view", [False, True])
def test_fused_adamw_under_distributed_data_parallel(as_view: bool) -> None:
    """Two processes over gloo, each with its own data: both ranks hold the same bits, and what torch's AdamW would
    hold."""
    port = free_port()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DDP, str(rank), str(port), str(as_view)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=120)
            assert out.strip().endswith("agrees"), error[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.filterwarnings("ignore")
def test_fused_adamw_under_lightning(tmp_path: Any) -> None:
    """Two epochs with accumulation over two batches, a checkpoint, and a resumed third epoch, beside torch's AdamW."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.net, self.kind = make(), kind

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return (self.net(batch) - batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = self.kind(self.net.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def trainer(epochs: int) -> Any:
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return lightning.Trainer(
            max_epochs=epochs, accumulate_grad_batches=2, accelerator="cpu", default_root_dir=tmp_path, **quiet
        )

    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        first, loader = trainer(2), torch.utils.data.DataLoader(X, batch_size=4)
        first.fit(Module(kind), loader)
        first.save_checkpoint(tmp_path / "last.ckpt")
        module = Module(kind)
        trainer(3).fit(module, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
        results.append(module.net)
    assert same(*results) and not same(results[0], make())


@pytest.mark.filterwarnings("ignore")
def test_fused_adamw_under_accelerate(tmp_path: Any) -> None:
    """Accumulation, its own clipping, and a saved and restored state, beside torch's AdamW."""
    accelerate = pytest.importorskip("accelerate")
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make()
        optimizer = kind(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(X, batch_size=4))
        for epoch in range(2):
            for x in loader:
                with accelerator.accumulate(model):
                    accelerator.backward((model(x) - x).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 0:
                accelerator.save_state(tmp_path / kind.__name__)
            else:
                accelerator.load_state(tmp_path / kind.__name__)
        results.append(accelerator.unwrap_model(model))
    assert same(*results) and not same(results[0], make())


@pytest.mark.slow
def test_plain_loop_example_runs_and_learns() -> None:
    script = os.path.join(os.path.dirname(__file__), "..", "..", "..", "examples", "plain_loop.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "200 steps" in done.stdout and "0 skipped" in done.stdout
    assert float(done.stdout.split("loss ")[1].split(",")[0]) < 0.1  # it begins at 0.5, the variance of the targets
