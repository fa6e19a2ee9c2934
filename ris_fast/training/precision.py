"""training.precision = "auto": bfloat16 where it is measured to pay and gives float32's gradients to its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ris_fast.data.source import SceneSource
from ris_fast.models.linear import linear
from ris_fast.physics.scenes import Scenes
from ris_fast.timing import alternate
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.step import autocast, network_inputs

PAYS = 1.4  # times the rate of float32 products; products are four fifths of a large network's step in float32
SECONDS = 0.15  # of products in each precision
SCENES = 16
AGREES = 0.05  # relative difference of the whole gradient; of the network `original` rounding makes it 0.006


def peak_matmul_rate(device: torch.device, precision: str = "fp32", seconds: float = 2.0) -> float:
    """FLOP/s of one large matrix product in this precision, the best of all that fit into the time and at least six.

    The best and not a median: other programs can only slow a product down, and one that takes a few milliseconds, as
    long as a system lets a thread run at a stretch, finds a moment without them. On a CPU both libraries that torch may
    call are tried, and the faster one counts.
    """
    size = 8192 if device.type == "cuda" else 128 * round(4.0 * torch.get_num_threads() ** 0.5)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    kinds = {"matmul": lambda: a @ b} | ({"linear": lambda: linear(a, b)} if device.type == "cpu" else {})
    found = alternate(kinds, device, quiet=10**6, seconds=seconds, warm=1, least=6 // len(kinds))
    return 2.0 * size**3 / min(each["fastest_s"] for each in found.values())


def refuse_tf32(device: torch.device, precision: str) -> None:
    """Has fp32 mean fp32 on a GPU: cuDNN rounds the inputs of float32 convolutions to 11 bits unless told not to, which
    torch leaves it free to do; matrix products are exact by default. For the whole process."""
    if device.type == "cuda" and precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False


def choose_precision(
    model: nn.Module, loss: CovarianceLoss, source: SceneSource, device: torch.device
) -> tuple[str, str]:
    """bf16 or fp32, and one line that says why. The random numbers of the run stay as they are."""
    if device.type == "cuda":
        fits = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "precision bf16: this GPU has it") if fits else ("fp32", "precision fp32: this GPU has no bf16")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32", "precision fp32: this processor or torch has no bf16 products"
    with torch.random.fork_rng([]):
        rates = {name: peak_matmul_rate(device, name, SECONDS) / 1e9 for name in ("fp32", "bf16")}
        speed = f"bf16 products run at {rates['bf16']:,.0f} GFLOP/s here, fp32 at {rates['fp32']:,.0f}"
        if rates["bf16"] < PAYS * rates["fp32"]:
            return "fp32", f"precision fp32: {speed}, which does not pay"
        scenes = source.batch("train", torch.arange(min(SCENES, source.size("train")), device=source.index_device))
        gap = gradient_gap(model, loss, scenes, device)
    if gap > AGREES:
        return "fp32", f"precision fp32: {speed}, but its gradient differs by {gap:.2g} of fp32's"
    return "bf16", f"precision bf16: {speed}; its gradient differs by {gap:.2g} of fp32's"


def gradient_gap(model: nn.Module, loss: CovarianceLoss, scenes: Scenes, device: torch.device) -> float:
    """|g - g32| / |g32| of the gradients of the loss in bf16 and in fp32; 0 where fp32 has none to compare with."""
    wide, low = (_gradient(model, loss, scenes, device, name) for name in ("fp32", "bf16"))
    size = wide.norm().item()
    return (low - wide).norm().item() / size if 0.0 < size < float("inf") else 0.0


def _gradient(model: nn.Module, loss: CovarianceLoss, scenes: Scenes, device: torch.device, precision: str) -> Tensor:
    """The gradient of every trainable parameter, one after the other; empty where autograd leads nowhere."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng([]):
        with autocast(device, precision):
            prediction = model(*network_inputs(scenes))
        total = loss(prediction, scenes)[0]
    if not trained or not total.requires_grad:
        return torch.zeros(0)
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return torch.cat([torch.zeros(0), *(each.flatten().float() for each in found if each is not None)])
