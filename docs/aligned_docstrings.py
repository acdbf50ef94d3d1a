"""A griffe extension for the site: paragraphs of aligned `name   meaning` lines, as our docstrings have them, become lists."""

from __future__ import annotations

import re

import griffe

ENTRY = re.compile(r"(\w+) {2,}(\S.*)")


class AlignedLists(griffe.Extension):
    """Rewrites every docstring that griffe collects."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = "\n\n".join(map(as_list, obj.docstring.value.split("\n\n")))


def as_list(paragraph: str) -> str:
    """The paragraph as a Markdown list if each of its lines is an entry or goes on with one, else as it is."""
    lines = paragraph.split("\n")
    if not all(ENTRY.fullmatch(line) or line.startswith("  ") for line in lines) or not ENTRY.fullmatch(lines[0]):
        return paragraph
    return "\n".join(
        f"- `{found[1]}`: {found[2]}" if (found := ENTRY.fullmatch(line)) else "  " + line.strip() for line in lines
    )
