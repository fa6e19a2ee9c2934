"""A PyTorch loop of your own with the loss, the optimizer and the watch of ris-fast; run it with no arguments."""

import torch

from ris_fast import FusedAdamW, SceneGenerator, build_model, cov_nmse, simulate
from ris_fast.config.schema import Task
from ris_fast.health import watch

task, generator = Task(), SceneGenerator(seed=0, split="train")
model = build_model("backprojection", task)  # or any module of yours
optimizer = FusedAdamW(model.named_parameters(), lr=1e-3, max_grad_norm=1.0, ema_decay=0.99)
seen = watch(model, optimizer)  # any torch optimizer
for step in range(10):
    scenes = simulate(task, torch.arange(64) + 64 * step, generator)  # scene i is always scene i
    prediction = model(scenes.snapshots, scenes.channel, scenes.codes, scenes.snr_db)
    loss = cov_nmse(prediction.factor, target_factor=scenes.factor)  # 1 for a zero factor, 0 for the target
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: NMSE {loss.item():.3f}")
print(*seen.report(), sep="\n")  # why it does not learn; nothing where it does
