"""Words of the command line that tests share: settings, and those of a small task and network."""

from __future__ import annotations

SMALL_TASK = ("task.ris_horizontal=4", "task.ris_vertical=4", "task.bs_antennas=4", "task.snapshots=4")
FEW_SCENES = ("data.train_scenes=64", "data.val_scenes=32")
SMALL_NETWORK = (
    "model.options.width=32",
    "model.options.layers=1",
    "model.options.heads=2",
    "model.options.feedforward=32",
    "model.options.grid=9",
)


def settings(*texts: str) -> list[str]:
    """`--set` before each KEY=VALUE."""
    return [word for text in texts for word in ("--set", text)]
