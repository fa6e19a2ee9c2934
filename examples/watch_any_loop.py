"""Why a loop does not learn: `watch` beside any model and any torch optimizer. This one clips its gradient away."""

import torch

from ris_fast.health import watch

torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
seen = watch(model, optimizer)  # frozen=("encoder.",) declares layers that are meant to keep their weights
for _ in range(10):
    optimizer.zero_grad()
    model(torch.randn(32, 8)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    optimizer.step()
print(*seen.report(), sep="\n")  # clip_too_small: how much arrives, and how little reaches the optimizer
