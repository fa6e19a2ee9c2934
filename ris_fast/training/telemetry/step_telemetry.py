"""What the step sees of itself: gradients before anything touched them, weights before and after, the scenes as served.

Taken on the first steps and then on every report, as tensors that stay on the device until `read`; nothing here waits.
Between two reports the fused step keeps its own record of every step, a norm a tensor, in a ring on the device.

Legend: B batch, T tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ris_fast.physics.scenes import Scenes
from ris_fast.training.ranks.rank_telemetry import RankTelemetry, read_ranks
from ris_fast.training.telemetry.micro_batches import COARSE, MicroBatches, coarse_formats, read_micro_batches
from ris_fast.training.telemetry.module_modes import ModuleModes
from ris_fast.training.telemetry.scene_ring import SceneRing
from ris_fast.training.telemetry.step_window import DECAY, Window, median

DENSE = 8  # the contracts of the loop show in the first steps
FEW_SCENES = 64  # whose answers are compared with one another
FEW_NUMBERS = 64  # of a target, which tell it from others
TOUCHED = 1e-4  # of a tensor's norm: more than the rounding of two sums of squares
VISIBLE = 1e-5  # of a norm: a way that float32 does not hide
NEXT_TO_ZERO = 0.01  # rms of a tensor
REMEMBERED = 64  # sampled steps whose scenes are kept, to see one of them again


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(T,) float32: the norm of each tensor, on the device of the first that is not on the CPU. Half precision is added
    in float32."""
    if not tensors:
        return torch.zeros(0)
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    narrow = {tensor.dtype for tensor in tensors} - {torch.float32}
    wide = torch.float32 if narrow and narrow <= {torch.float16, torch.bfloat16} else None
    each = torch._foreach_norm([tensor.detach() for tensor in tensors], 2, wide)
    return torch.stack([norm.to(device, torch.float32, non_blocking=device.type == "cuda") for norm in each])


def weight_norms(model: nn.Module) -> Tensor:
    """(T,) float32 norms of all parameters: weights with the same norms, bit for bit, have not moved."""
    return norms(list(model.parameters()))


@torch.no_grad()
def row_hashes(values: Tensor) -> Tensor:
    """(B,) int64: a hash of each row's bytes, on the device; equal rows have equal hashes."""
    bits = values.detach().float().contiguous().flatten(1).view(torch.int32).long()
    position = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return ((bits ^ (position * 2654435761)) * (2 * position * 40503 + 1)).sum(1)


def count_invalid_rows(values: Tensor) -> Tensor:
    """(2,) int64: rows that are all zeros, and rows with a value that is not finite."""
    peak = values.detach().flatten(1).abs().amax(1)
    return torch.stack([(peak == 0).sum(), (~peak.isfinite()).sum()])


def spread(answer: Tensor) -> Tensor:
    """(): variance over the first axis of B > 1 rows, as a share of the mean square. (`Tensor.var` over rows takes ten
    times as long.)"""
    rows, norm = len(answer), torch.linalg.vector_norm
    return (norm(answer - answer.mean(0)) / norm(answer).clamp_min(1e-15)).square() * (rows / (rows - 1))


def modules_in_eval_mode(model: nn.Module) -> list[str]:
    """Names of the modules that are in evaluation mode; '' is the network itself."""
    return [name for name, module in model.named_modules() if not module.training]


@dataclass(frozen=True)
class StepSample:
    """A step as it was seen: its number, the modules that were in evaluation mode, tensors by name, and what the host
    knew of it.

    Of every step of a report: "records" and "record_steps" of `FusedAdamW.records`; the rest only of a step that was
        read.
    """

    call: int
    modes: ModuleModes
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class StepTelemetry:
    """Readings of one optimizer step at a time; `Step` calls the methods in their order.

    `every`: a step is read on the first eight and then each time this many steps have passed. `ranks`: reads what the
    ranks of the run say of themselves, within `Trainer.fit`; None where there is one. `ring`: keeps the scenes of every
    step; None: of none.
    """

    def __init__(self, model: nn.Module, optimizer: Any, every: int, ring: SceneRing | None = None) -> None:
        self.ring = ring
        self.model, self.optimizer, self.every = model, optimizer, max(1, every)
        self.calls, self.sampled, self.enabled, self.fresh = 0, False, True, True
        self.first: Tensor | None = None  # weight norms before the first step
        self.kept: tuple[int, Tensor] | None = None  # call and weight norms after the last step that was read
        self.earlier: set[bytes] = set()  # norms after sampled steps
        self.window: Window | None = None  # what the last report brought
        self.last_reported, self.reported_calls = 0, 0  # number of the last step in a window; calls until then
        self.last_record: tuple[int, Tensor] | None = None  # of that step
        self.seen: list[tuple[int, frozenset[tuple[int, int]]]] = []  # (epoch, scenes with their targets)
        self.ranks: RankTelemetry | None = None
        self._clear()

    def _clear(self) -> None:
        self.residual_grad_norm: Tensor | None = None
        self.raw: Tensor | None = None
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.spread: Tensor | None = None
        self.row_hashes: list[Tensor] = []
        self.target_hashes: list[Tensor] = []
        self.invalid_rows: list[Tensor] = []
        self.coarse: Tensor | None = None
        self.micro_batches: MicroBatches | None = None

    def next_due(self) -> bool:
        """Whether the step that comes is read."""
        made = self.optimizer.attempted_steps() if self.fresh else self.calls
        return self.due(made + 1)

    def due(self, call: int) -> bool:
        """Whether the step of this number, counted from 1, is read."""
        return self.enabled and (call <= DENSE or call % self.every == 0)

    def begin_epoch(self) -> None:
        """The steps from here on belong to the next epoch."""
        if self.ring is not None:
            self.ring.begin_epoch()

    def know_validation(self, batches: Sequence[Scenes]) -> None:
        """The scenes that are validated, which no step should be shown."""
        if self.ring is not None:
            self.ring.know_validation(batches)

    # ---- called by the step ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        if self.fresh:  # a resumed run counts on, so that its reports find what they report
            self.calls = self.reported_calls = self.optimizer.attempted_steps()
        self.calls, self.fresh = self.calls + 1, False
        self.sampled = self.due(self.calls)
        self._clear()
        if self._ranks_read:
            self.ranks.begin()
        if self.ring is not None and self.enabled:
            self.ring.made += 1
        if self.sampled:
            self.micro_batches = MicroBatches(self.model)
            self.before = weight_norms(self.model)
            self.first = self.before if self.first is None else self.first

    def cleared(self) -> None:
        """After the gradients were cleared."""
        if self.ring is not None and self.enabled:
            self.ring.begin()
        if self.sampled:
            self.residual_grad_norm = norms(self._gradients()).norm()

    @torch.no_grad()
    def shown(self, scenes: Scenes, factor: Tensor) -> None:
        """One micro-batch as the network received it, and what it answered, (B, N, Q, 2)."""
        if self.ring is not None and self.enabled:
            self.ring.add(scenes)
        if not self.sampled:
            return
        self.micro_batches.shown(factor)
        self.row_hashes.append(row_hashes(scenes.snapshots))
        target = scenes.factor if scenes.covariance is None else scenes.covariance
        self.target_hashes.append(row_hashes(target.flatten(1)[:, :FEW_NUMBERS]))
        self.invalid_rows.append(count_invalid_rows(scenes.snapshots))
        if self._ranks_read:
            self.ranks.shown(scenes, self.row_hashes[-1], self.invalid_rows[-1])
        if len(factor) > 1:
            self.spread = spread(factor[:FEW_SCENES].detach().float())

    def weighted(self, share: float) -> None:
        """A micro-batch whose loss counts for this share of the step's."""
        if self._ranks_read:
            self.ranks.weighted(share)
        if self.sampled:
            self.micro_batches.weighted(share)

    def before_reduction(self, gradients: Sequence[Tensor]) -> None:
        """After backward, with this rank's own gradients, as flat buffers; where there are several ranks."""
        if self._ranks_read:
            self.ranks.before_sum(norms(self._gradients()), gradients)

    def after_reduction(self, gradients: Sequence[Tensor]) -> None:
        """With the sum of all ranks' gradients in those buffers."""
        if self._ranks_read:
            self.ranks.after_sum(gradients)

    def differentiated(self) -> None:
        """After backward and the sum over ranks, before anything else has touched the gradients."""
        if self.sampled:
            self.raw = norms(self._gradients())
            self.micro_batches.differentiated()

    def updated(self) -> None:
        """After the optimizer's step."""
        if self.sampled:
            self.after = weight_norms(self.model)
            if (largest := self._largest()) is not None:
                self.coarse = coarse_formats(largest.detach())
        if self.ring is not None and self.enabled:
            self.ring.close()

    def _largest(self) -> Tensor | None:
        """The largest float32 tensor that is trained."""
        wide = [each for each in self.model.parameters() if each.requires_grad and each.dtype == torch.float32]
        return max(wide, key=Tensor.numel, default=None)

    @property
    def _ranks_read(self) -> bool:
        return self.sampled and self.ranks is not None

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    # ---- called at a report ----------------------------------------------------------------------------------------

    def sample(self) -> StepSample | None:
        """What a report takes with it of the last step and of those before it, still on the device; None for
        nothing."""
        tensors: dict[str, Tensor | None] = {}
        if self.after is not None and self.raw is not None and self.before is not None:
            tensors = {
                "before": self.before,
                "after": self.after,
                "raw": self.raw,
                "first": self.first,
                "table": self.optimizer.telemetry(),
                "residual_grad_norm": self.residual_grad_norm,
                "spread": self.spread,
                "row_hashes": torch.cat(self.row_hashes) if self.row_hashes else None,
                "target_hashes": torch.cat(self.target_hashes) if self.target_hashes else None,
                "invalid_rows": torch.stack(self.invalid_rows).sum(0) if self.invalid_rows else None,
                "coarse": self.coarse,
                **self.micro_batches.tensors(),
                "ranks": self.ranks.gathered if self._ranks_read else None,
            }
        records, numbers = self.optimizer.records()
        if len(numbers):
            tensors |= {"records": records, "record_steps": numbers}
        tensors |= {} if self.ring is None else self.ring.tensors()
        tensors = {name: value for name, value in tensors.items() if value is not None}
        facts = self.micro_batches.facts() if self.micro_batches is not None else {}
        return StepSample(self.calls, ModuleModes.of(self.model, training=False), tensors, facts) if tensors else None

    def read(self, sample: StepSample | None, epoch: int) -> dict[str, Any]:
        """A sample in plain numbers; empty for None. Waits for the device where the tensors are still there."""
        if sample is None:
            return {}
        seen = {name: value.cpu() for name, value in sample.tensors.items()}
        read = self._read_window(sample.call, seen)
        if (
            self.ring is not None
            and "served" in seen
            and (served := self.ring.read(seen["served"], seen["served_steps"]))
        ):
            read["served"] = served
        return read | (self._read_step(sample, seen, epoch) if "table" in seen else {})

    def rest(self) -> Window:
        """The steps since the last report, at the end of a run, which comes without one. Waits for the device."""
        records, numbers = (each.cpu() for each in self.optimizer.records())
        return Window.after(self.last_reported, records, numbers, self.calls - self.reported_calls)

    def _read_window(self, call: int, seen: dict[str, Tensor]) -> dict[str, Any]:
        """What the ring has kept since the last report."""
        if "records" not in seen:
            return {}
        self.window = Window.after(
            self.last_reported, seen["records"], seen["record_steps"], call - self.reported_calls, self.last_record
        )
        self.reported_calls = call
        if self.window.numbers:
            self.last_reported = self.window.numbers[-1]
            self.last_record = self.last_reported, self.window.table[-1]
        return {"window": self.window.summary(self.optimizer.tensor_names)}

    def _read_step(self, sample: StepSample, seen: dict[str, Tensor], epoch: int) -> dict[str, Any]:
        """The step that was looked at."""
        before, after, raw, table = (seen[name] for name in ("before", "after", "raw", "table"))
        hashes = seen["row_hashes"].tolist() if "row_hashes" in seen else []
        zeros, nonfinite = seen["invalid_rows"].tolist() if "invalid_rows" in seen else (0, 0)
        targets = seen["target_hashes"].tolist() if "target_hashes" in seen else []
        reading = {
            "call": sample.call,
            "residual_grad_norm": _number(seen.get("residual_grad_norm")),
            "raw_norm": _number(raw.norm()),
            "raw_nonfinite": int((~raw.isfinite()).sum()),
            "tensors": len(after),
            "moved": changed(before, after),
            "moved_before": self._moved_before(sample.call, before),
            "back_to_first": sample.call > 1 and changed(before, seen["first"]) == 0,
            "back_to_earlier": _bytes(before) in self.earlier and _bytes(before) != _bytes(self.kept[1]),
            "batch": f"{sum(hashes) & (2**64 - 1):016x}",
            "scenes": len(hashes),
            "distinct": len(set(hashes)),
            "distinct_targets": len(set(targets)),
            **self._repeated(hashes, targets, epoch),
            "zero_scenes": zeros,
            "nonfinite_scenes": nonfinite,
            "spread": _number(seen.get("spread")),
            "modules_in_eval_mode": len(sample.modes.names),
            "first_module_in_eval_mode": (sample.modes.names or [None])[0],
            **({"eval_mode": sample.modes.to_json()} if sample.modes.names else {}),
            "nonfinite_before": int((~before.isfinite()).sum()),
            "nonfinite_after": int((~after.isfinite()).sum()),
            "touched_after": self._touched_after(after, table),
            "coarse_format": next((name for name, each in zip(COARSE, seen.get("coarse", ())) if each), None),
            **read_micro_batches([name for name, each in self.model.named_parameters() if each.requires_grad], seen),
            **sample.facts,
            "update_ratio": self._update_ratio(table),
            "weight_norm": float(after.norm()),
        }
        self.kept = (sample.call, after)
        self.earlier = {*([] if len(self.earlier) >= REMEMBERED else self.earlier), _bytes(after)}
        return reading | ({"ranks": read_ranks(seen["ranks"])} if "ranks" in seen else {})

    def _update_ratio(self, table: Tensor) -> float:
        """How far the median tensor moved, of itself: of those that have a gradient, as experts that got no scene have
        none, and of these of those that do not begin next to zero, which move by all of themselves at first."""
        sizes = {name: each.numel() for name, each in self.model.named_parameters()}
        sides = torch.tensor([sizes.get(name, 1) for name in self.optimizer.tensor_names]).sqrt()
        with_gradient = table[:, 0] > 0
        kept = with_gradient & (table[:, 1] > NEXT_TO_ZERO * sides)
        rows = table[next((mask for mask in (kept, with_gradient) if bool(mask.any())), slice(None))]
        return median((rows[:, 2] / rows[:, 1].clamp_min(1e-30)).tolist())

    def _moved_before(self, call: int, before: Tensor) -> int:
        """Tensors that changed between the update of the step before and this step: something else moved them."""
        return changed(self.kept[1], before) if self.kept and self.kept[0] == call - 1 else 0

    def _touched_after(self, after: Tensor, table: Tensor) -> int:
        """Tensors whose norm is not the one that the optimizer left, unless all of them shrink by one small share, as a
        weight decay of one's own makes them."""
        place = {name: index for index, (name, _) in enumerate(self.model.named_parameters())}
        both = [(place[name], row) for row, name in enumerate(self.optimizer.tensor_names) if name in place]
        if not both:
            return 0
        own, rows = (torch.tensor(column) for column in zip(*both))
        left = table[rows]
        shares = (1 - after[own].float() / left[:, 1])[(left[:, 2] > 0) & (left[:, 1] > 0)]
        shares = shares[shares.abs() > TOUCHED]
        decayed = len(shares) > 1 and 0 < shares.min() and shares.max() < min(DECAY, shares.min() + TOUCHED)
        return 0 if decayed else len(shares)

    def _repeated(self, hashes: list[int], targets: list[int], epoch: int) -> dict[str, int]:
        """Scenes of this step that it has twice, or that another sampled step of the same epoch had; and how many of
        these have another target now."""
        here, pairs = frozenset(hashes), frozenset(zip(hashes, targets))
        sampled = [scenes for number, scenes in self.seen if number == epoch]
        known = frozenset().union(*sampled)
        earlier = frozenset(scene for scene, _ in known)
        other = len(pairs) - len(here) if targets else 0
        other += sum(scene in earlier and (scene, target) not in known for scene, target in pairs)
        self.seen = [*self.seen[-REMEMBERED:], (epoch, pairs or frozenset((each, 0) for each in here))]
        return {"repeated": len(hashes) - len(here) + len(here & earlier), "repeated_with_other_target": other}


class WeightDriftMonitor:
    """Weight norms at the seams of an epoch, where nothing may move a weight: around validation, and between epochs.

    Args: first: the norms that the run began with, (T,); those of now by default.
    """

    def __init__(self, model: nn.Module, first: Tensor | None = None) -> None:
        self.model = model
        self.first, self.last = weight_norms(model) if first is None else first, None
        self.earlier: dict[bytes, int] = {}  # norms of earlier calls -> number of the call

    def check(self) -> dict[str, Any]:
        """Tensors that changed since the last call, whether all are as they were at the very beginning, and whether
        they are as an earlier call saw them."""
        now, before = weight_norms(self.model), self.last
        self.last = now
        moved = 0 if before is None else changed(before, now)
        back, number = moved > 0 and changed(self.first, now) == 0, len(self.earlier)
        seen_at = self.earlier.setdefault(_bytes(now), number)
        return {"moved": moved, "back_to_first": back, "back_to_earlier": moved > 0 and seen_at < number}

    @property
    def size(self) -> float:
        """The first norms, summed over tensors."""
        return float(self.first.sum())

    def distance(self, weights: Tensor) -> float:
        """How far norms (T,) have come from the first ones, summed over tensors."""
        return float((weights - self.first).abs().sum()) if len(weights) == len(self.first) else math.nan

    def held(self, mean: Tensor, raw: Tensor) -> int:
        """How many norms of averages are the first ones while the raw ones have gone further than rounding hides.

        Args: mean, raw: norms, (T,) each.
        """
        if not len(mean) == len(raw) == len(self.first):
            return 0
        share = float((mean - self.first).abs().sum() / (raw - self.first).abs().sum().clamp_min(1e-30))
        return int(((mean == self.first) & (share * (raw - self.first).abs() > VISIBLE * self.first)).sum())


def changed(before: Tensor, after: Tensor) -> int:
    """How many of two (T,) sets of norms differ; not-a-number equals itself."""
    if len(before) != len(after):
        return max(len(before), len(after))
    return int(((before != after) & ~(before.isnan() & after.isnan())).sum())


def _bytes(norms: Tensor) -> bytes:
    return norms.cpu().numpy().tobytes()


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
