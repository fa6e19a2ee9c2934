"""Docstrings as Markdown, for mkdocstrings: a griffe extension that knows the form in which ours are written.

A docstring is a sentence, then sections such as `Model:`, `Args:` and `Raises:`, each of which may begin and go on in
one line: "Args: azimuth, elevation (...) rad; range_m: (...) m". Parameters are found by their names in the signature.
Fields of a class are described by the comment behind them, with shape and unit; they become a table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import griffe

SECTIONS = ("Model", "Args", "Returns", "Raises", "Numerics", "Cost", "Source", "CUDA graphs")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}): ?", re.M)
INLINE = re.compile(r"(?<=[.;)]) (Returns|Raises): ")  # behind the arguments, in their line
CODE = re.compile(r"(`[^`]*`)")
MARKUP = re.compile(r"([\\*_{}\[\]>#|])")


class Docstrings(griffe.Extension):
    """Loads `kernels/` as ris_fast.kernels, and writes every docstring of the package as Markdown."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.name != "ris_fast":
            return
        if "kernels" not in pkg.members:  # in the repository it lies beside the package
            pkg.set_member("kernels", loader.load("kernels"))
        for each in objects(pkg):
            describe(each)


def objects(inside: griffe.Object) -> Iterator[griffe.Object]:
    """Everything that is defined in a module or class, aliases left out."""
    for member in inside.members.values():
        if not member.is_alias:
            yield member
            yield from objects(member)


def describe(each: griffe.Object) -> None:
    if each.is_class:
        told = fields(each)
        if each.docstring is not None or told:
            text = "" if each.docstring is None else each.docstring.value
            names = [field.name for field in attributes(each)]
            init = each.members.get("__init__")
            names += [] if init is None or not init.is_function else [parameter.name for parameter in init.parameters]
            each.docstring = griffe.Docstring(markdown(text, names) + told, parent=each)
    elif each.docstring is not None:
        names = [parameter.name for parameter in each.parameters] if each.is_function else []
        each.docstring = griffe.Docstring(markdown(each.docstring.value, names), parent=each)
    if each.is_function:  # `*unnamed: Never` is there to refuse, in words, what a signature without it refuses too
        each.parameters = griffe.Parameters(*(one for one in each.parameters if str(one.annotation) != "Never"))


def attributes(kind: griffe.Object) -> list[griffe.Attribute]:
    """The annotated fields in the body of a class; what `__init__` sets is none."""
    found = [each for each in kind.members.values() if each.is_attribute and each.annotation is not None]
    return [each for each in found if each.source.lstrip().startswith(f"{each.name}:")]


def fields(kind: griffe.Object) -> str:
    """A table of the fields that have a comment behind them, "shape  meaning"; empty where there is none."""
    rows = []
    for each in attributes(kind):
        _, _, comment = each.source.partition("  # ")
        shape, _, meaning = comment.strip().partition("  ")
        if shape:
            rows.append(f"| `{each.name}` | {escaped(shape)} | {escaped(meaning.strip())} |\n")
    return "\n\n| field | shape | meaning |\n|---|---|---|\n" + "".join(rows) if rows else ""


def markdown(text: str, names: Iterable[str]) -> str:
    """A docstring as Markdown: its sections as paragraphs, its arguments as a list."""
    text = INLINE.sub(r"\n\1: ", inspect.cleandoc(text))
    pieces = HEADING.split(text)
    parts = [paragraphs(pieces[0])]
    for heading, body in zip(pieces[1::2], pieces[2::2]):
        lines = body.split("\n")
        end = next((n for n, line in enumerate(lines) if n and line and not line.startswith(" ")), len(lines))
        body, rest = "\n".join(lines[:end]), "\n".join(lines[end:])
        if heading == "Args":
            parts.append("**Args**\n\n" + arguments(body, list(names)))
        else:
            parts.append(f"**{heading}:** {escaped(flat(body))}")
        parts.append(paragraphs(rest))
    return "\n\n".join(part for part in parts if part)


def arguments(body: str, names: list[str]) -> str:
    """A list item for each argument or group of arguments; the text as it is where no name of the signature is met."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not known:
        return escaped(flat(body))
    begin = re.compile(rf"(?:^|(?<=;)|(?<=\.))\s*(?=(?:{known})\b[^:;`]{{0,140}}?:(?:\s|$))", re.M)
    starts = [found.end() for found in begin.finditer(body)]
    if not starts or body[: starts[0]].strip():
        starts = [0, *starts]
    items = []
    for start, end in zip(starts, [*starts[1:], len(body)]):
        item = flat(body[start:end]).rstrip(";")
        head, colon, said = item.partition(":")
        if not re.match(rf"(?:{known})\b", head):
            items.append(f"- {escaped(item)}")
            continue
        head = CODE.sub(r"\1", re.sub(rf"\b(?:{known})\b", lambda name: f"`{name[0]}`", head))
        items.append(f"- {escaped(head)}{colon}{escaped(said)}")
    return "\n".join(items)


def paragraphs(text: str) -> str:
    return "\n\n".join(escaped(flat(part)) for part in re.split(r"\n\s*\n", text) if part.strip())


def flat(text: str) -> str:
    return " ".join(text.split())


def escaped(text: str) -> str:
    """Formulas are plain text: y_l, |R|^2 and [B,] are no markup. What is in backticks stays as it is."""
    parts = CODE.split(text)
    return "".join(part if part.startswith("`") else MARKUP.sub(r"\\\1", part).replace("<", "&lt;") for part in parts)
