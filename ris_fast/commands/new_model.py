"""`ris-fast new-model FILE`: a commented network that trains, to start a network of one's own from."""

from __future__ import annotations

import os
import shlex
from importlib import resources
from pathlib import Path

from ris_fast import exit_codes
from ris_fast.config.schema import ConfigError
from ris_fast.files import make_folder, write_text

NAME = "BeamNet"


def new_model(file: Path, /) -> int:
    """Write a commented network that trains, as a start for one of your own.

    Parameters
    ----------
    file
        Python file to write, such as net.py; one that is there stays.
    """
    if file.suffix != ".py":
        raise ConfigError(f"new-model: {file} is no Python file; give a name that ends in .py, such as {file.stem}.py.")
    if os.path.lexists(file):
        raise ConfigError(f"new-model: {file} is there already, and stays as it is. Give the name of a new file.")
    make_folder(file.parent)
    text = resources.files("ris_fast.models").joinpath("starting_point.py").read_text(encoding="utf-8")
    write_text(file, text.replace("FILE:", f"{shlex.quote(str(file))}:"))
    named = f"model.name={shlex.quote(f'{file}:{NAME}')}"
    print(
        f"{file}: {NAME}, which trains as it is. Change it, then\n"
        f"  ris-fast check --set {named}    says what is wrong with it, before anything is trained\n"
        f"  ris-fast train --set {named}"
    )
    return exit_codes.DONE
