"""Preflight of a network that torch compiled: silent, compiled once for preflight and run together, and a wrong graph is named."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from ris_fast.health.faults.twins import TWINS, changed
from ris_fast.health.watchdog import Watchdog
from ris_fast.training.devices import missing_compiler
from ris_fast.training.loop import Trainer

needs_compiler = pytest.mark.skipif(missing_compiler(torch.device("cpu")) is not None, reason="no compiler")


@needs_compiler
def test_a_compiled_network_passes_is_compiled_once_and_a_wrong_graph_is_named() -> None:
    """One test, because one compilation is what it costs: about ten seconds."""
    trainer = Trainer(changed(TWINS["backprojection"](), {"training.compile": True}))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    graphs, watchdog = counters["stats"]["unique_graphs"], Watchdog(trainer)
    assert watchdog.preflight() == [] and not [check.failed for check in watchdog.checks if check.failed]
    trainer._compile()
    assert counters["stats"]["unique_graphs"] - graphs == 1 and trainer.compile_note.startswith("compiled with torch.compile")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    right = trainer.network.trunk
    trainer.network.trunk = lambda features: (lambda answer: answer._replace(factor=answer.factor.roll(1, 0)))(right(features))
    assert Watchdog(trainer).preflight()[0].cause == "compiled_differs"
