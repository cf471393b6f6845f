"""Sphinx settings: Markdown pages and stored notebooks through MyST-NB, the reference from the docstrings, the Furo theme."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "cryolike-data"
author = "the cryolike-data authors"
copyright = author
version = release = installed_version("cryolike-data")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"cryolike-data {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py runs them; the pages show what is stored

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True  # the attributes of a dataclass are documented once, in its docstring
napoleon_use_rtype = False  # "Returns" says what comes back; its type stands in the signature

_SECTIONS = {"Parameters", "Attributes"}
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_][\w, *]*) : (.+)")


def describe_entries(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Put what follows ``name :`` on a line of its own.

    Our docstrings leave types to the annotations and say there what a value means; Napoleon would take that for a type.
    """
    if what == "property":
        lines[0] = lines[0].replace(": ", "; ")  # here too Napoleon expects a type before a colon
    section, changed = "", []
    for number, line in enumerate(lines):
        if number + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[number + 1]):
            section = line
        entry = _ENTRY.fullmatch(line) if section in _SECTIONS else None
        changed += [entry[1], f"    {entry[2]}"] if entry else [line]
    lines[:] = [line.replace("(*", r"(\*") for line in changed]  # a shape such as (*grid) is no emphasis


def setup(app: Any) -> None:
    """Run ``describe_entries`` before Napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", describe_entries, priority=400)
