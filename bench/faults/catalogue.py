"""What a fault is, and the list of all: ten families, in sets by who wrote them and when.

The suite of 2026-07 has a third that the author of its rules never read. The sets of 2026-11 were written by other
hands, one after the other: each was scored once on rules whose authors had not seen it, and read by them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.faults.healthy_twins import TWINS, changed
from ris_fast.config.schema import Config
from ris_fast.health.causes import CAUSES
from ris_fast.training.trainer import Trainer

SUITE, HELD_OUT_SUITE = "2026-07 suite", "2026-07 suite, held out"
FIRST, SECOND, THIRD = "2026-11 first", "2026-11 second", "2026-11 third"
FOURTH, FIFTH, SIXTH = "2026-11 fourth", "2026-11 fifth", "2026-11 sixth"
SEVENTH, EIGHTH = "2026-11 seventh", "2026-11 eighth"
SETS = (SUITE, HELD_OUT_SUITE, FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, SEVENTH, EIGHTH)
# modules of unseen_2026_11/
UNSEEN = (
    "first_network",
    "first_data",
    "second_network",
    "second_data",
    "third_network",
    "third_data",
    "fourth_network",
    "fourth_data",
    "fifth_network",
    "fifth_data",
    "sixth_network",
    "sixth_data",
    "seventh_network",
    "seventh_data",
    "eighth_network",
    "eighth_data",
)

FAMILIES = ("parameters", "graph", "loss", "loop", "precision", "averaging", "mode", "data", "model", "compiled")

# A third of every family, chosen before any rule was written. Their patches are in held_out/.
HELD_OUT = frozenset(
    (
        "one_layer_frozen",
        "group_filter_misses_a_layer",
        "factor_heads_tied",
        "network_copied",
        "weight_kept_as_buffer",
        "no_grad_around_encoder",
        "covariance_term_in_numpy",
        "hook_zeroes_gradient",
        "factor_rounded",
        "divided_only_first",
        "target_of_twice_the_trace",
        "degrees_converted_twice",
        "loss_clamped",
        "optimizer_maximises",
        "step_gated_on_both_groups",
        "schedule_ticks_per_epoch",
        "one_group_without_rate",
        "optimizer_rebuilt_each_epoch",
        "rate_far_too_small",
        "every_other_batch_skipped",
        "infinity_becomes_one",
        "gradients_underflow_in_half",
        "large_epsilon_in_rms",
        "ema_poisoned",
        "average_decays_at_once",
        "average_validated_as_raw",
        "dropout_always_on",
        "encoder_left_in_eval",
        "running_statistics_never_updated",
        "iterator_restarted",
        "labels_off_by_one",
        "axes_reshaped_not_transposed",
        "raw_units_at_the_input",
        "channel_of_the_next_scene",
        "real_and_imaginary_swapped",
        "constant_initialisation",
        "phase_thrown_away",
        "one_column_repeated",
        "factor_clamped",
        "compiled_before_weights_replaced",
        "ranks_not_reduced",
        "compiled_in_eval_mode",
    )
)

Patch = Callable[[Trainer], None]


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        mistake: what a person did wrong, in one line.
        expect: causes any one of which is a right first answer.
        by: when it should be said: "preflight", "steps:N" (optimizer steps attempted after `onset`) or "share:P".
        twin: the healthy configuration that the mistake is made in.
        settings: the mistake, where it is one of configuration: 'section.key' -> value.
        patch: the mistake, made on a trainer between construction and `fit`.
        around: the mistake, made on classes or functions while the trainer is built and runs; undone afterwards.
        onset: optimizer steps before the mistake has its first effect.
        right, right_around: the same unusual form without the mistake, where the twin is not the plain configuration.
        written: the set that it belongs to, one of SETS.
    """

    name: str
    family: str
    mistake: str
    expect: tuple[str, ...]
    by: str
    twin: str = "hybrid"
    settings: Mapping[str, Any] = field(default_factory=dict)
    patch: Patch | None = None
    around: Callable[[], AbstractContextManager] | None = None
    onset: int = 0
    right: Patch | None = None
    right_around: Callable[[], AbstractContextManager] | None = None
    written: str = SUITE

    def __post_init__(self) -> None:
        unknown = [cause for cause in self.expect if cause not in CAUSES]
        if unknown or self.family not in FAMILIES or self.twin not in TWINS or self.written not in SETS:
            found = unknown or self.family, self.twin, self.written
            raise ValueError(f"fault {self.name}: cause, family, twin or set unknown: {found}.")

    @property
    def held_out(self) -> bool:
        return self.name in HELD_OUT

    @property
    def hidden(self) -> bool:
        """A person who writes rules sees totals of its set only."""
        return self.written != SUITE

    @property
    def own_twin(self) -> bool:
        """Its twin is a form of its own, not the plain configuration."""
        return bool(self.right or self.right_around)

    @property
    def twin_name(self) -> str:
        """What its healthy twin is called: one of TWINS, or the fault's own name."""
        return self.name if self.own_twin else self.twin

    def healthy(self) -> Fault:
        """Its twin as a record, without a mistake."""
        return replace(self, settings={}, patch=self.right, around=self.right_around, right=None, right_around=None)

    def config(self, twin: Config | None = None) -> Config:
        """The configuration of the faulty run; that of the healthy twin with `settings` on top."""
        return changed(twin or TWINS[self.twin](), self.settings)


@contextmanager
def faulty(fault: Fault, twin: Config | None = None, folder: Path | None = None) -> Iterator[Trainer]:
    """A trainer with the fault in it, ready to fit; everything beyond the trainer itself is undone at the end."""
    with (fault.around or nullcontext)():
        trainer = Trainer(fault.config(twin), folder)
        if fault.patch is not None:
            fault.patch(trainer)
        yield trainer


class Family:
    """Collects the faults of one family in one module, all of one set."""

    def __init__(self, name: str, written: str = SUITE) -> None:
        self.name, self.written = name, written
        self.faults: list[Fault] = []

    def patch(self, mistake: str, expect: str, by: str, **more: Any) -> Callable[[Patch], Patch]:
        """Decorator of a patch on a trainer; the fault takes the function's name."""

        def keep(function: Patch) -> Patch:
            self._add(function.__name__, mistake, expect, by, patch=function, **more)
            return function

        return keep

    def around(self, mistake: str, expect: str, by: str, **more: Any) -> Callable[[Callable], Callable]:
        """Decorator of a generator that changes a class or function, yields, and is undone."""

        def keep(function: Callable) -> Callable:
            self._add(function.__name__, mistake, expect, by, around=contextmanager(function), **more)
            return function

        return keep

    def pair(self, mistake: str, expect: str, by: str, **more: Any) -> Callable[[Callable], Callable]:
        """Decorator of a patch `name(trainer, wrong)`, which makes the mistake where `wrong`, else the same rightly."""

        def keep(function: Callable) -> Callable:
            forms = {"patch": partial(function, wrong=True), "right": partial(function, wrong=False)}
            self._add(function.__name__, mistake, expect, by, **forms, **more)
            return function

        return keep

    def around_pair(self, mistake: str, expect: str, by: str, **more: Any) -> Callable[[Callable], Callable]:
        """Decorator of a generator `name(wrong)`, as `around`, which makes the mistake where `wrong`."""

        def keep(function: Callable) -> Callable:
            manager = contextmanager(function)
            forms = {"around": partial(manager, wrong=True), "right_around": partial(manager, wrong=False)}
            self._add(function.__name__, mistake, expect, by, **forms, **more)
            return function

        return keep

    def setting(self, name: str, mistake: str, expect: str, by: str, settings: Mapping[str, Any], **more: Any) -> None:
        """A fault that is a setting."""
        self._add(name, mistake, expect, by, settings=settings, **more)

    def _add(self, name: str, mistake: str, expect: str, by: str, **more: Any) -> None:
        self.faults.append(Fault(name, self.name, mistake, tuple(expect.split()), by, written=self.written, **more))


def all_faults() -> dict[str, Fault]:
    """Every fault by name: the suite in the order of its families, then the later sets."""
    tuned = [fault for family in FAMILIES for fault in import_module(f"{__package__}.{family}").FAMILY.faults]
    held_out = [
        replace(fault, written=HELD_OUT_SUITE)
        for family in FAMILIES
        for fault in import_module(f"{__package__}.held_out.{family}").FAMILY.faults
    ]
    unseen = [
        fault
        for module in UNSEEN
        for family in import_module(f"{__package__}.unseen_2026_11.{module}").ALL
        for fault in family.faults
    ]
    ordered = sorted(tuned + held_out, key=lambda fault: FAMILIES.index(fault.family))
    ordered += sorted(unseen, key=lambda fault: (SETS.index(fault.written), FAMILIES.index(fault.family)))
    faults = {fault.name: fault for fault in ordered}
    if len(faults) != len(ordered) or {fault.name for fault in held_out} != HELD_OUT:
        raise ValueError("faults: a name is used twice, or held_out/ and HELD_OUT differ.")
    return faults
