"""From where a model is called: the same lines all the way up are the same place."""

from __future__ import annotations

from os.path import basename
from pathlib import Path
from types import FrameType

import torch

DEPTH = 24  # frames
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_IN_LIBRARY: dict[str, bool] = {}  # by file


def call_site(frame: FrameType | None) -> tuple[int, str]:
    """A number that is the same for calls from the same place, and the innermost line outside of torch."""
    key: list[int] = []
    place = ""
    while frame is not None and len(key) < 2 * DEPTH:
        code = frame.f_code
        if (library := _IN_LIBRARY.get(code.co_filename)) is None:
            library = _IN_LIBRARY[code.co_filename] = code.co_filename.startswith(_LIBRARIES)
        if not library:
            key += id(code), frame.f_lasti
            place = place or f"{basename(code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return hash(tuple(key)), place
