"""What MkDocs does beside turning docs/*.md into pages: tables made from the code, notebooks, links out of docs/.

A page holds `<!-- NAME -->` where a table of `TABLES` goes. Nothing here or in the pages is fetched from elsewhere.
"""

from __future__ import annotations

import base64
import inspect
import json
import posixpath
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from docstrings import escaped  # noqa: E402  beside this file, which is on no path

MARKER = re.compile(r"^<!-- (\w+) -->$", re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # of the repository, shown here too
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A notebook is in the navigation under its own name, and becomes a page."""
    config.nav = as_pages(config.nav)
    return config


def as_pages(nav: Any) -> Any:
    if isinstance(nav, list):
        return [as_pages(each) for each in nav]
    if isinstance(nav, dict):
        return {title: as_pages(each) for title, each in nav.items()}
    return f"{nav.removesuffix('.ipynb')}.md" if isinstance(nav, str) and nav.endswith(".ipynb") else nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere, the notebooks as pages, and the colours of code."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    files.append(File.generated(config, "examples.md", content=examples()))
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, "site/code.css", content=colours))
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        files.remove(file)
        name = file.src_uri.removesuffix(".ipynb")
        text, pictures = notebook(json.loads(file.content_string), posixpath.basename(name))
        files.append(File.generated(config, f"{name}.md", content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(name), picture), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills the tables in, and follows links as the repository's folders have them."""
    made = MARKER.sub(lambda found: TABLES[found[1]](), markdown)
    home = "" if page.file.src_uri in PAGES.values() else "docs"
    folder = posixpath.join(home, posixpath.dirname(page.file.src_uri))
    return LINK.sub(lambda found: link(found, folder, page.file.src_uri), made)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Cells of wide tables say what they are, for a phone, where a row is shown as a card."""
    return re.sub(r"<table>.*?</table>", lambda found: labelled(found[0]), html, flags=re.S)


def labelled(table: str) -> str:
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th[^>]*>(.*?)</th>", table, re.S)]
    if len(heads) < 3:
        return table

    def row(found: re.Match[str]) -> str:
        numbers = iter(range(len(heads)))
        return re.sub(r"<td", lambda _: f'<td data-label="{heads[next(numbers)]}"', found[0])

    return re.sub(r"<tr>.*?</tr>", row, table, flags=re.S)


def link(found: re.Match[str], folder: str, source: str) -> str:
    """A link within docs/ as it is, to an example or page of the repository as one of the site, else as its path."""
    picture, text, target = found.groups()
    if "://" in target or target.startswith(("#", "mailto:")) or picture:
        return found[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    if path.startswith("docs/"):
        place = path.removeprefix("docs/").removesuffix(".ipynb") + (".md" if path.endswith(".ipynb") else "")
    elif path in PAGES:
        place = PAGES[path]
    elif path.startswith("examples/"):
        place, anchor = "examples.md", posixpath.basename(path).replace(".", "").lower()
    elif path == "README.md":
        place = "index.md"
    elif (ROOT / path).exists():
        return f"`{path}`" if text.strip("`").rstrip("/") in path else f"{text} (`{path}`)"
    else:
        return found[0]
    start = posixpath.dirname(source) or "."
    return f"[{text}]({posixpath.relpath(place, start)}{'#' + anchor if anchor else ''})"


def settings() -> str:
    """Every setting of every section, with its default and what it may be."""
    from ris_fast.config.schema import SECTIONS

    parts = []
    for name, section in SECTIONS.items():
        rows = [setting(name, item) for item in fields(section)]
        head = f"## [{name}]\n\n{escaped(inspect.getdoc(section) or '')}\n\n"
        parts.append(head + "| setting | default | may be | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def setting(section: str, item: Any) -> str:
    rule, default = item.metadata, {} if item.default is MISSING else item.default
    low, high = rule["low"], rule["high"]
    if rule["choices"]:
        may_be = ", ".join(f"`{each}`" for each in rule["choices"])
    elif low is not None or high is not None:
        may_be = f"{low:g} to {high:g}" if None not in (low, high) else f"{low:g} or more"
    else:
        may_be = {"bool": "`true`, `false`", "str": "text"}.get(item.type, "a table")
    shown = json.dumps(default)
    meaning = escaped(rule["help"])
    return f"| <span id='{section}.{item.name}'></span>`{section}.{item.name}` | `{shown}` | {may_be} | {meaning} |"


def presets() -> str:
    """The files of the presets as they are."""
    files = sorted((ROOT / "ris_fast" / "config" / "presets").glob("*.toml"))
    return "\n\n".join(f"### {file.stem}\n\n```toml\n{file.read_text().strip()}\n```" for file in files)


def commands() -> str:
    """Every command: what it does, its arguments and flags."""
    from ris_fast.commands.cli import app

    return "\n\n".join(command(name, app[name]) for name in app if not name.startswith("-"))


def command(name: str, app: Any) -> str:
    summary = " ".join(app.help.partition("Parameters\n")[0].split())
    rows, usage = [], [f"ris-fast {name}"]
    for each in app.assemble_argument_collection(parse_docstring=True):
        flag, positional = each.names[0], not each.names[0].startswith("-")
        if positional:
            several = "..." if each.field_info.kind.name == "VAR_POSITIONAL" else ""
            usage.append((flag if each.required else f"[{flag}]") + several)
        elif each.hint is not bool:
            flag += " " + ("|".join(each.get_choices() or ()) or kind(each.hint))
        text = escaped(" ".join((each.parameter.help or "").split()))
        rows.append(f"| `{flag}` | {text}{' Required.' if each.required and not positional else ''} |")
    usage += ["[FLAGS]"] if any(row.startswith("| `--") for row in rows) else []
    table = "| argument | meaning |\n|---|---|\n" + "\n".join(rows)
    return f"## {name}\n\n{escaped(summary)}\n\n```sh\n{' '.join(usage)}\n```\n\n{table if rows else ''}"


def kind(hint: Any) -> str:
    """What a flag takes, in one word, as `--help` shows it."""
    words = str(getattr(hint, "__name__", hint))
    for part, word in (("list", "TEXT"), ("Path", "PATH"), ("int | str", "N"), ("int", "N"), ("float", "NUMBER")):
        if part in words:
            return word
    return "TEXT"


def exit_codes() -> str:
    """The table of exit codes, from the comments behind them."""
    source = (ROOT / "ris_fast" / "exit_codes.py").read_text()
    rows = re.findall(r"^([A-Z_]+) = (\d+)  # (.+)$", source, re.M)
    lines = [f"| {number} | `{name}` | {escaped(said)} |" for name, number, said in rows]
    return "| code | name | when |\n|---|---|---|\n" + "\n".join(lines)


def causes() -> str:
    """Every cause that a finding names, with what `ris-fast why --explain` prints of it."""
    from ris_fast.health.causes import CAUSES

    parts = []
    for name, cause in CAUSES.items():
        page = re.sub(r"^## (.+)\n\n", r"**\1:** ", cause.body.strip(), flags=re.M)
        parts.append(f"## {name}\n\n*{cause.level}:* {cause.meaning}.\n\n{page}")
    return "\n\n".join(parts)


def examples() -> str:
    """The programs in examples/, whole."""
    files = sorted((ROOT / "examples").glob("*.py"))
    parts = [f"## {file.name}\n\n```python\n{file.read_text().strip()}\n```" for file in files]
    return "\n\n".join(
        ["# Examples", "Each runs as it is, `python examples/NAME.py`, and is run by the tests.", *parts]
    )


def notebook(content: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its pictures by the names that the Markdown gives them."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in content["cells"]:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(fenced("python", source))
            parts += [output(each, name, pictures) for each in cell["outputs"]]
    return "\n\n".join(part for part in parts if part), pictures


def output(said: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """What a cell printed, returned or drew: a picture where there is one, else its text."""
    if said["output_type"] == "stream":
        return fenced("text", ANSI.sub("", joined(said["text"])))
    if said["output_type"] == "error":
        return fenced("text", ANSI.sub("", "\n".join(said["traceback"])))
    for mime, ending in PICTURES.items():
        if mime in said["data"]:
            file, data = f"{name}-{len(pictures) + 1}.{ending}", joined(said["data"][mime])
            pictures[file] = data.encode() if ending == "svg" else base64.b64decode(data)
            return f"![{joined(said['data'].get('text/plain', 'figure')).strip('<>')}]({file})"
    return fenced("text", joined(said["data"].get("text/plain", "")))


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def fenced(language: str, text: str) -> str:
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall(r"`{3,}", text)), 0)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}" if text.strip() else ""


TABLES = {
    "causes": causes,
    "commands": commands,
    "exit_codes": exit_codes,
    "presets": presets,
    "settings": settings,
}
