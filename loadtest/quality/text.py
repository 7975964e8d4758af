"""Plain text out of the files that a user names."""
from __future__ import annotations

import html.parser
import pathlib
import re
import sys
from typing import Iterable


class _Prose(html.parser.HTMLParser):
    """The paragraphs of a page (<p>, and what DocBook makes of its para); listings and tables left out."""

    SKIPPED = {"script", "style", "pre", "table"}
    VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}

    def __init__(self):
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[tuple[str, bool, bool]] = []  # (tag, is a paragraph, is skipped), innermost last
        self._inside: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag in self.VOID:
            return
        paragraph = tag == "p" or "para" in (dict(attrs).get("class") or "").split()
        self._open.append((tag, paragraph, tag in self.SKIPPED))

    def handle_endtag(self, tag):
        while self._open:
            name, paragraph, _ = self._open.pop()
            if paragraph and not any(outer for _, outer, _ in self._open):
                self.paragraphs.append(" ".join("".join(self._inside).split()))
                self._inside = []
            if name == tag:
                return

    def handle_data(self, data):
        if any(inside for _, inside, _ in self._open) and not any(skipped for _, _, skipped in self._open):
            self._inside.append(data)


def read(paths: Iterable[str]) -> str:
    """The text of files (.html: its paragraphs), in their order, joined by blank lines."""
    parts = []
    for path in paths:
        content = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
        if re.search(r"\.html?$", path):
            parser = _Prose()
            parser.feed(content)
            content = "\n\n".join(paragraph for paragraph in parser.paragraphs if len(paragraph) > 80)
        parts.append(content)
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(read(sys.argv[1:]))
