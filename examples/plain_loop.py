"""A plain PyTorch loop in which `torch.optim.AdamW` was swapped for `ris_fast.FusedAdamW`; run it with no arguments."""

import torch
from torch import nn

from ris_fast import FusedAdamW

torch.manual_seed(0)
inputs = torch.randn(512, 16)
targets = torch.sin(inputs @ torch.randn(16, 4))
model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 4))

# Was: torch.optim.AdamW(model.parameters(), lr=1e-2), clip_grad_norm_ in the loop, and a copy of the weights to
# average.
optimizer = FusedAdamW(model.named_parameters(), lr=1e-2, max_grad_norm=1.0, ema_decay=0.99, ema_warmup=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)

for _ in range(200):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
    scheduler.step()

counters = optimizer.counters()
raw = nn.functional.mse_loss(model(inputs), targets).item()
with optimizer.ema():  # averaged weights inside, raw ones again afterwards
    averaged = nn.functional.mse_loss(model(inputs), targets).item()
print(f"{optimizer.backend}: {counters['applied']} steps, {counters['clipped']} clipped, {counters['skipped']} skipped")
print(f"loss {raw:.4f}, with averaged weights {averaged:.4f}")
for name, row in zip(optimizer.tensor_names, optimizer.telemetry().tolist()):
    print(f"{name:10s} gradient {row[0]:.1e}  weight {row[1]:6.3f}  update {row[2]:.1e}  non-finite {row[3]:.0f}")
