"""Every example of the README and of the pages in docs/ runs, in the order of its page, starting from an empty folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cryolike_data
from cryolike_data.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """Language, text and line number of every fenced block of a page."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        yield match[1], match[2], text.count("\n", 0, match.start(2))


def commands(block: str) -> Iterator[list[str]]:
    """The arguments of every ``cryolike-data`` command in a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["cryolike-data"]:
            yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, block, line in blocks(page):
        if language == "python":
            exec(compile("\n" * line + block, str(page), "exec"), names)  # so that a traceback shows the line of the page
        elif language in ("bash", "console"):
            for arguments in commands(block):
                assert main(arguments) == 0, f"{page.name}, after line {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_reference_holds_every_public_name() -> None:
    reference = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in cryolike_data.__all__ if not re.search(rf"\b{name}\b", reference)] == []


def test_the_readme_says_where_every_module_is() -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    modules = [path.name for path in (ROOT / "cryolike_data").glob("*.py") if not path.name.startswith("_")]
    assert [name for name in sorted(modules) if f"{name}`" not in page] == []
