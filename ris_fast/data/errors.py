"""The one error of the data layer: which file, which key, what was found, what was expected, what to do."""

from __future__ import annotations

from pathlib import Path

from ris_fast import exit_codes


class DataError(Exception):
    """A data set that cannot be used. Exit code 3.

    Args: where: file or folder. key: the array in it, or "" for the file as a whole. found, expected: noun
        phrases. todo: one imperative sentence.
    """

    exit_code = exit_codes.DATA

    def __init__(self, where: str | Path, key: str, found: str, expected: str, todo: str) -> None:
        self.where, self.key, self.found, self.expected, self.todo = str(where), key, found, expected, todo
        location = f"{where}, key '{key}'" if key else f"{where}"
        super().__init__(f"{location}: found {found}; expected {expected}. {todo}")

    def __reduce__(self) -> tuple:
        return DataError, (self.where, self.key, self.found, self.expected, self.todo)  # from another process
