"""The documentation site: it builds without a warning, needs no network, and has every public name, setting and
command. Links of pages exist."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ris_fast
from ris_fast import exit_codes
from ris_fast.config.schema import SECTIONS
from ris_fast.health.causes import CAUSES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BESIDE = (
    "config.ConfigError",
    "health.watch.watch",
    "health.Finding",
    "models.Prediction",
    "inference.located.Located",
)
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "mkdocstrings")),
    reason="the extra docs is not here",
)


class PageReader(HTMLParser):
    """Identifiers and text of a page, and what it loads from elsewhere without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids.add(given.get("id") or "")
        target = given.get("src") or (given.get("href") if tag == "link" else None) or ""
        if target.startswith(("http:", "https:", "//")) and given.get("rel") != "canonical":
            self.loaded.append(target)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def page(site: Path, name: str) -> PageReader:
    reader = PageReader()
    reader.feed((site / f"{name}.html").read_text())
    return reader


@pytest.mark.slow
@needs_mkdocs
def test_reference_has_every_public_name(site: Path) -> None:
    reference = page(site, "reference")
    names = [f"ris_fast.{name}" for name in (*ris_fast.__all__, *BESIDE) if name != "__version__"]
    assert not [name for name in names if name not in reference.ids]
    assert "ris_fast.__version__" in reference.text
    assert r"\<" not in reference.text and "<-" in reference.text  # formulas are shown as they are written


@pytest.mark.slow
@needs_mkdocs
def test_settings_page_has_every_setting_with_its_help(site: Path) -> None:
    settings = page(site, "settings")
    options = {f"{name}.{item.name}": item for name, section in SECTIONS.items() for item in fields(section)}
    assert not [name for name in options if name not in settings.ids]
    assert not [name for name, item in options.items() if item.metadata["help"] not in settings.text]


@pytest.mark.slow
@needs_mkdocs
def test_commands_page_has_every_flag_and_exit_code(site: Path) -> None:
    from ris_fast.commands.cli import app

    commands = page(site, "commands")
    names = [name for name in app if not name.startswith("-")]
    assert set(names) <= commands.ids
    flags = {each.names[0] for name in names for each in app[name].assemble_argument_collection(parse_docstring=True)}
    assert not [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", commands.text)]
    codes = [name for name, value in vars(exit_codes).items() if isinstance(value, int)]
    assert codes and not [name for name in codes if name not in commands.text]


@pytest.mark.slow
@needs_mkdocs
def test_causes_page_has_every_cause(site: Path) -> None:
    assert CAUSES.keys() <= page(site, "causes").ids


@pytest.mark.slow
@needs_mkdocs
def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = {name: page(site, name).loaded for name in (file.stem for file in site.glob("*.html"))}
    assert loaded and not any(loaded.values())
    styles = [file.read_text() for file in site.rglob("*.css")]
    assert styles and not [text for text in styles if re.search(r"url\(['\"]?(https?:)?//|@import", text)]


@pytest.mark.slow
@needs_mkdocs
def test_site_shows_a_notebook_and_refuses_a_dead_link(tmp_path: Path) -> None:
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("docs", "mkdocs.yml", "build"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "reference.md").write_text("# Nothing of the code, which takes its time\n\n## Versions\n")
    (tmp_path / "docs" / "notebooks").mkdir(exist_ok=True)
    (tmp_path / "docs" / "notebooks" / "trial.ipynb").write_text(NOTEBOOK)
    settings = (ROOT / "mkdocs.yml").read_text().replace("nav:\n", "nav:\n  - Trial: notebooks/trial.ipynb\n")
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    shown = page(tmp_path / "site", "notebooks/trial").text
    assert "print ( 1 + 1 )" in shown and " 2 " in shown and "A heading" in shown
    assert (tmp_path / "site" / "notebooks" / "trial-1.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "docs" / "data.md").write_text("[nowhere](no-such-page.md)\n")
    assert "no-such-page.md" in (refused := build(tmp_path, tmp_path / "site")).stderr and refused.returncode != 0


NOTEBOOK = """{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [
{"cell_type": "markdown", "metadata": {}, "source": ["# A heading\\n", "and the [settings](../settings.md)"]},
{"cell_type": "code", "metadata": {}, "execution_count": 1, "source": ["print(1 + 1)"], "outputs": [
 {"output_type": "stream", "name": "stdout", "text": ["2\\n"]},
 {"output_type": "display_data", "metadata": {}, "data": {"text/plain": ["<Figure size 1x1>"], "image/png":
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="}}]}]}
"""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_exist(path: Path) -> None:
    linked = [target for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()) if "://" not in target]
    assert not [target for target in linked if not (path.parent / target).exists()]


def test_newest_version_of_the_changelog_is_the_packages() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert versions[0] == ris_fast.__version__ and len(versions) == len(re.findall(r"^## ", text, re.M))
    assert versions == sorted(versions, key=lambda version: [*map(int, version.split("."))], reverse=True)
