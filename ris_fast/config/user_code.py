"""Code of the user's own that a setting names, as 'package.module:name' or 'path/to/file.py:name': found, imported,
known by its source.

Only the standard library is imported here, so that anything may import this file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ris_fast.config.section import ConfigError
from ris_fast.config.spelling import did_you_mean

OBJECT = "object:"  # beginning of the name of what was handed over as an object, and has no other
FORMS = "'package.module:NAME' or 'path/to/file.py:NAME'"


def is_reference(text: str) -> bool:
    """Whether a setting names code of the user's own."""
    return ":" in text or text.endswith(".py")


def absolute_reference(text: str) -> str:
    """The same reference whatever the working folder: a file's path made absolute, a module's name as it is."""
    place, name = _parts(text)
    return ":".join(filter(None, (os.path.abspath(os.path.expanduser(place)), name))) if _is_file(place) else text


def short_reference(text: str) -> str:
    """How messages and checkpoints call it, wherever the file lies: 'file.py:NAME'."""
    place, name = _parts(text)
    return ":".join(filter(None, (os.path.basename(place), name))) if _is_file(place) else text


def load_reference(
    setting: str,
    text: str,
    what: str,
    accepts: Callable[[Any], bool] = callable,
    *,
    sole: Callable[[Any], bool] | None = None,
) -> Any:
    """What `text` names. The working folder, or that of the file, is searched for modules that it imports.

    Args:
        setting: what an error calls it, such as 'model.name'.
        what: that is expected there, for the error, such as 'a class derived from torch.nn.Module'.
        accepts: whether an object is that.
        sole: a file's name alone means the one object defined in it that this takes.
    Raises: ConfigError, one line: no such file, module or name; the import's own error with its place; another kind.
    """
    if text.startswith(OBJECT):
        raise ConfigError(
            f"{setting} = '{text}': it was handed to Trainer as an object, which no command can make. Hand it over"
            " again, Trainer(...) or ris_fast.load(RUN, model=net); what a file defines has a name that commands find."
        )
    place, name = _parts(text)
    module = _imported(setting, text, place)
    defined = {k: each for k, each in vars(module).items() if getattr(each, "__module__", None) == module.__name__}
    own = [key for key, value in defined.items() if _accepted(accepts, value)]
    if not name:
        meant = [value for value in defined.values() if sole is not None and _accepted(sole, value)]
        if len(meant) == 1:
            return meant[0]
        found = f"it defines {', '.join(own)}" if own else f"it defines nothing that is {what}"
        raise ConfigError(f"{setting} = '{text}' does not say which object is meant: {found}. Write {place}:NAME.")
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = own or [key for key in vars(module) if not key.startswith("_")]
            hint = did_you_mean(name, known) if known else f" It defines nothing that is {what}."
            raise ConfigError(f"{setting} = '{text}': {place} has no '{name}'.{hint}")
        found = getattr(found, part)
    if not _accepted(accepts, found):
        raise ConfigError(f"{setting} = '{text}' is a {_kind(found)}; expected {what}.")
    return found


def source_hash(thing: Any) -> str:
    """SHA-256 of the file that defines a class, a function or the class of an object; "" where there is none, as for
    what was typed at a prompt."""
    while isinstance(thing, partial):
        thing = thing.func
    try:
        file = inspect.getsourcefile(thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing))
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def where_raised(error: BaseException) -> str:
    """' (file.py, line N)' of the last line of the traceback that is neither a library's nor ours; '' where there is
    none."""
    own = [each for each in traceback.extract_tb(error.__traceback__) if _is_users(each.filename)]
    return f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def first_line(error: BaseException) -> str:
    """'Kind: message' in one line, of an error that code of the user's raised."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _is_users(filename: str) -> bool:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    libraries = package, os.path.dirname(os.__file__), "<frozen"
    return not filename.startswith(libraries) and f"{os.sep}site-packages{os.sep}" not in filename


def _parts(text: str) -> tuple[str, str]:
    place, colon, name = text.rpartition(":")
    return (place, name) if colon else (text, "")


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _imported(setting: str, text: str, place: str) -> ModuleType:
    if not place:
        raise ConfigError(f"{setting} = '{text}' names no module; expected {FORMS}.")
    try:
        return _from_file(Path(os.path.abspath(os.path.expanduser(place)))) if _is_file(place) else _from_name(place)
    except _Missing as missing:
        raise ConfigError(f"{setting} = '{text}': {missing}") from None
    except SystemExit as left:
        raise ConfigError(
            f"{setting} = '{text}' ends the program when it is imported{where_raised(left)}. Put what it does as a"
            " script, its arguments too, below `if __name__ == '__main__':`."
        ) from left
    except Exception as error:  # whatever their module raises
        at = where_raised(error)
        if isinstance(error, SyntaxError) and error.filename:
            at = f" ({os.path.basename(error.filename)}, line {error.lineno})"
            error = type(error)(error.msg)
        mend = "Mend that line" if at else "Mend that module"
        raise ConfigError(f"{setting} = '{text}' cannot be imported: {first_line(error)}{at}. {mend}.") from error


class _Missing(Exception):
    """What is not there, as the end of a message."""


def _from_name(name: str) -> ModuleType:
    """The working folder comes first while it is imported, as for `python -c`, and stays on the path, at its end."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    before = sys.path[:]
    try:
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # it is there, and imports something that is not
        file = Path(*name.split(".")).with_suffix(".py")
        hint = f"Write {file}:NAME for that file" if file.is_file() else "Give the path of a file, path/to/file.py:NAME"
        raise _Missing(
            f"there is no module '{error.name}' on Python's path or in {os.getcwd()}. {hint}, or install it here."
        ) from None
    finally:
        sys.path[:] = [*before, *(each for each in sys.path if each not in before)]


def _from_file(path: Path) -> ModuleType:
    """The module of a file, once a process and content, under a name that no other module has."""
    if not path.is_file():
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise _Missing(f"there is no file '{path}'.{near if near != ' There are: .' else ''}")
    mark = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"{path.stem}_{mark}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file whose name ends in .py has both
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _accepted(accepts: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(accepts(value))
    except TypeError:  # issubclass of what is no class
        return False


def _kind(found: Any) -> str:
    return f"class ({found.__name__})" if inspect.isclass(found) else type(found).__name__
