"""The original pipeline's training step around its network, written from its description alone.

What it does a step: the anti-diagonal pool by 287 gathers behind two products with diagonal matrices, the objective of
`original_loss`, a finite test of every gradient that waits for the device, clipping and a second norm, AdamW as torch
chooses it, a drift probe over all parameters flattened twice, and an average over the whole state dict.

Legend: B batch, N RIS elements, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ris_fast.benchmarks.peers.original_loss import original_loss
from ris_fast.benchmarks.peers.original_network import OriginalNetwork
from ris_fast.config.schema import Config
from ris_fast.physics.real_complex import to_complex
from ris_fast.physics.scenes import Scenes
from ris_fast.training.mfu import with_torch_layers
from ris_fast.training.step import autocast, network_inputs, parameter_groups


class AntiDiagonalPool(nn.Module):
    """Means of the whitened A A^H along its 2N - 1 anti-diagonals, real parts then imaginary ones: (B, 4N - 2)."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        rows = torch.arange(elements)
        total = rows[:, None] + rows
        for place in range(2 * elements - 1):
            self.register_buffer(f"index_{place}", (total == place).flatten().nonzero().squeeze(1))

    def forward(self, factor_BNK: Tensor) -> Tensor:
        a = to_complex(factor_BNK)
        cov = a @ a.mH
        scale = torch.diagonal(cov, dim1=1, dim2=2).real.clamp_min(1e-12).rsqrt()
        whitener = torch.diag_embed(scale).to(cov.dtype)
        flat = (whitener @ cov @ whitener).flatten(1)
        means = torch.stack([flat[:, index].mean(1) for index in self.buffers()], dim=1)
        return torch.cat((means.real, means.imag), dim=1)


class OriginalLoop:
    """`step(scenes)`: one optimizer step of the original. Serves the network `hybrid`."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        if config.model.name != "hybrid":
            raise ValueError(f"OriginalLoop: serves model 'hybrid', not '{config.model.name}'.")
        self.model = with_torch_layers(OriginalNetwork(config.task, **config.model.options)).to(device)
        self.model.diagonal_means = AntiDiagonalPool(config.task.elements).to(device)
        groups = parameter_groups(self.model, config.optimizer)
        self.parts = {
            part: [p for group in groups if group["name"].startswith(part) for _, p in group["params"]]
            for part in ("backbone", "head")
        }
        rates = {"backbone": config.optimizer.backbone_lr, "head": config.optimizer.head_lr}
        self.optimizer = torch.optim.AdamW(
            [{"params": self.parts[part], "lr": rates[part]} for part in self.parts],
            weight_decay=config.optimizer.weight_decay,
        )
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.running, self.drift = 0.0, 0.0

    def step(self, scenes: Scenes) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.config.training.precision):
            prediction = self.model(*network_inputs(scenes))
        with torch.autocast(self.device.type, enabled=False):
            loss = original_loss(prediction, scenes, self.config.loss)
        loss.backward()
        if self._gradients_are_good():
            before = self._flattened()
            self.optimizer.step()
            self.drift = (self._flattened() - before).norm().item()
            self._average()
        self.running += loss.item()
        return loss.detach()

    def _gradients_are_good(self) -> bool:
        """Every tensor tested by itself, then two norms of everything, then the gate on both groups."""
        finite = [bool(torch.isfinite(p.grad).all()) for p in self.model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm or float("inf"))
        norms = [
            torch.stack([p.grad.norm() for p in part if p.grad is not None]).norm().item()
            for part in self.parts.values()
        ]
        return all(finite) and min(norms) > 0.0

    @torch.no_grad()
    def _flattened(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.config.optimizer.ema_decay
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].mul_(decay).add_(value, alpha=1.0 - decay)
            else:
                self.average[name].copy_(value)
