"""`ris-fast export`: the network of a run as a file for other programs, compared with the run before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ris_fast import exit_codes
from ris_fast.commands.flags import Whole
from ris_fast.streams import stage


def export(
    run: Path,
    /,
    *,
    format: Literal["torch-export", "onnx", "safetensors"],
    out: Path,
    portable: bool = False,
    scenes: Whole = None,
    json: bool = False,
) -> int:
    """Write the network of a run as a file for other programs, once its answers are the run's own on real scenes.

    Parameters
    ----------
    run
        Run folder, whose best checkpoint is meant, or one checkpoint, RUN/checkpoints/NAME.safetensors.
    format
        torch-export (.pt2: graph and weights), onnx (.onnx) or safetensors (weights and settings).
    out
        File to write, whole or not at all.
    portable
        Of torch-export: torch's own operators only, several times slower; runs where ris-fast is not installed.
    scenes
        Scenes on which file and run are compared, the run's first test scenes; 200 by default.
    json
        Print JSON instead of lines.
    """
    stage("loading torch")
    from ris_fast.inference.export import SCENES, Agreement, export_run
    from ris_fast.report.eventlog import dumps

    found = export_run(run, format, out, portable=portable, scenes=SCENES if scenes is None else scenes)
    if json:
        print(dumps(found, indent=2))
        return exit_codes.DONE
    print(f"compared with the run: {Agreement(**found['agreement']).text()}")
    if needs := found.get("needs"):
        print(f"needs, before it is loaded: {'; '.join(needs)}")
    print(f"inputs: {', '.join(found['inputs'])}; outputs: {', '.join(found['outputs'])}")
    print(f"written: {found['out']} ({found['bytes']:,} bytes)")
    return exit_codes.DONE
