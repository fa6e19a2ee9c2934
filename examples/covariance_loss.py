"""The covariance loss by itself: any factor F, complex or as real pairs, against a target factor or a dense target."""

import torch

from ris_fast import cov_nmse

factor = torch.randn(8, 144, 10, dtype=torch.complex64, requires_grad=True)  # the network's answer, F
target = torch.randn(8, 144, 5, dtype=torch.complex64)  # S, with R = S S^H up to its trace

loss = cov_nmse(factor, target_factor=target)  # 1 for a zero factor, 0 for the target
loss.backward()

dense = cov_nmse(torch.view_as_real(factor.detach()), target_cov=target @ target.mH)
loaded = cov_nmse(factor, target_factor=target, loading=0.1, reduction="none")  # blend, shrink: likewise, both sides
print(f"factor target {loss.item():.4f}, dense target {dense.item():.4f}, loaded, scene by scene {loaded.tolist()}")
