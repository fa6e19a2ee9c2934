"""`ris-fast env`: versions, devices, and the backend of each kernel with the reason."""

from __future__ import annotations

from typing import Any

from ris_fast import exit_codes
from ris_fast.environment import environment
from ris_fast.report.eventlog import dumps
from ris_fast.report.tables import text_table


def env_command(*, json: bool) -> int:
    """Prints the environment as a table, or as JSON."""
    found = environment()
    print(dumps(found, indent=2) if json else text_table(("what", "found"), environment_rows(found)))
    return exit_codes.DONE


def environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment as (what, value) lines of a table."""
    cpu, threads = found["cpu"], found["threads"]
    rows = [("python", found["python"]), ("platform", found["platform"])]
    rows += [(name, version or "not installed") for name, version in found["versions"].items()]
    rows.append(
        (
            "cpu",
            (
                f"{cpu['name']}, {cpu['cores']} cores usable, {cpu['torch_threads']} torch threads, "
                f"{cpu['memory_gib']:.1f} GiB"
            ),
        )
    )
    rows += [
        (
            "threads",
            f"{cpu['torch_threads']} of {threads['runtime'] or 'an OpenMP runtime that the system does not name'}",
        ),
        ("wait policy", f"{threads['policy']}, set by {threads['set_by']}"),
    ]
    rows += [
        (
            f"gpu {gpu['index']}",
            f"{gpu['name']}, {gpu['memory_gib']:.0f} GiB, sm_{gpu['capability']}, CUDA {gpu['cuda']}",
        )
        for gpu in found["gpus"]
    ]
    rows += [] if found["gpus"] else [("gpu", "none that torch can use")]
    return rows + [
        (f"{kernel['kernel']} on {kernel['device']}", f"{kernel['backend']}: {kernel['reason']}")
        for kernel in found["kernels"]
    ]
