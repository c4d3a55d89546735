"""Docstrings in Hugging Face's style for Sphinx: Markdown, with sections such as `Args:` and links such as [`Name`].

Sphinx reads docstrings as reStructuredText. Here each of them becomes the content of a directive that MyST parses: a
section is a bold word and a list, and a link leads to what the reference describes under that name, or is code where
the name belongs to another library or to the inside of this one.
"""

import pydoc
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger


logger = getLogger(__name__)

LISTS = {"Args": "Parameters", "Parameters": "Parameters", "Attributes": "Attributes", "Raises": "Raises"}
TEXTS = ("Returns", "Yields", "Examples")
# of an entry: `name (type):`, several names, or an exception
ENTRY = re.compile(r"(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*)(?=:| \()")


class MarkdownDirective(SphinxDirective):
    """Markdown within reStructuredText."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.env.docname, self.state.document.settings)
        document.reporter = self.state.document.reporter
        MystParser().parse("\n".join(self.content), document)
        return document.children


class DocstringRole(PyXRefRole):
    """A name in a docstring, looked up in the whole reference."""

    def process_link(
        self, env: Any, refnode: Any, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        refnode["in_docstring"] = True
        short = target.startswith("~")
        target = target.lstrip("~")
        title = target.removeprefix("maetok_hf.")
        if not target.startswith("maetok_hf."):
            refnode["refspecific"] = True  # any object whose name ends like that
        return (title.rpartition(".")[2] if short else title), target


def split_sections(lines: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Parts of a docstring: the name of a section, or `None` for text, and its lines without the indentation."""
    name, part = None, []
    for line in lines:
        title = line.removesuffix(":") if line.endswith(":") else None
        if title in LISTS or title in TEXTS:
            yield name, part
            name, part = title, []
        elif name is not None and line and not line.startswith(" "):
            yield name, part
            name, part = None, [line]
        else:
            part.append(line if name is None else line[4:])
    yield name, part


def _bold(match: re.Match) -> str:
    return "**" + match[0].replace("*", r"\*") + "**"


def to_items(lines: list[str]) -> list[str]:
    """The entries of a section as a list; lines that continue one are indented."""
    found = []
    for line in lines:
        if not line or line.startswith(" "):
            found.append(line[2:])
        else:
            found.append("- " + ENTRY.sub(_bold, line, count=1))
    return found


def to_markdown(lines: list[str]) -> list[str]:
    """
    A docstring as plain Markdown.

    Args:
        lines (`list[str]`): Its lines, without the indentation that all of them have.

    Returns:
        `list[str]`: Lines in which sections and links are such of MyST.
    """
    found = []
    for name, part in split_sections(lines):
        if name is not None:
            found += ["", f"**{LISTS.get(name, name)}**", ""]
        found += to_items(part) if name in LISTS else part
    return [re.sub(r"\[`(~?[\w.]+)`\](?!\()", r"{docstring}`\1`", line) for line in found]


def process_docstring(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    if what == "data":
        lines.clear()  # those of its type
    if any(lines):
        lines[:] = [".. markdown::", "", *(f"   {line}" for line in to_markdown(lines)), ""]


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: object) -> bool | None:
    """Leave out what other libraries document, and the fields of named tuples, which have no docstrings of ours."""
    module = getattr(getattr(value, "fget", value), "__module__", None)
    foreign = isinstance(module, str) and not module.startswith("maetok_hf")
    return True if foreign or type(value).__name__ == "_tuplegetter" else None


def show_as_code(app: Sphinx, env: Any, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """What is not described here stays as it is written; a full name must exist."""
    if not node.get("in_docstring"):
        return None
    target = node["reftarget"]
    if target.startswith("maetok_hf.") and pydoc.locate(target) is None:
        logger.warning("a docstring names %s, which does not exist", target, location=node)
    return content


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown", MarkdownDirective)
    app.add_role("docstring", DocstringRole("obj"))
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", show_as_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
