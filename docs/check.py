"""What must hold before pages are written: prose for everything public, links and anchors that work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

from source import Module


def problems_of(root: Path, modules: list[Module]) -> Iterator[str]:
    """What can be seen from the sources alone."""
    known = {module.shown_path for module in modules}
    for path in sorted((root / "retro").rglob("*.py")):
        if (shown_path := path.relative_to(root).as_posix()) not in known:
            yield f"{shown_path}:1: not in the reading order, in docs/build.py"
    for module in modules:
        for line, name in module.undocumented():
            yield f"{module.shown_path}:{line}: {name} is public and has no docstring"
        for node in [module.tree, *(found.node for found in module.found)]:
            string = node.body[0].value if module.docstring(node) else None  # type: ignore[attr-defined]
            text = (ast.get_source_segment(module.source, string) if string else None) or ""
            if text[:1] in "\"'" and (escaped := re.search(r"(?<!\\)(?:\\\\)*(\\[abfnrtv])", text)):
                line = node.body[0].lineno + text[: escaped.start()].count("\n")
                yield f'{module.shown_path}:{line}: {escaped[1]} in a docstring is a control character; use r"""'


class Links(HTMLParser):
    """The anchors of a page, and its links with the source that they come from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.source = "docs/build.py:1"
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.source = values.get("data-source") or self.source
        if line := re.fullmatch(r"L(\d+)", values.get("id") or ""):
            self.source = f"{self.source.partition(':')[0]}:{line[1]}"
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "a" and values.get("href"):
            self.links.append((values["href"] or "", self.source))


def broken_links(pages: dict[str, str]) -> Iterator[str]:
    """Links within the site that lead nowhere, and anchors that are there twice."""
    parsed = {name: Links(html) for name, html in pages.items()}
    for name, page in parsed.items():
        for anchor in sorted({a for a in page.ids if page.ids.count(a) > 1}):
            yield f"{name}: the anchor #{anchor} is there twice"
        for href, source in page.links:
            target = urlsplit(href)
            if target.scheme:
                continue
            other = parsed.get(target.path or name)
            if other is None:
                yield f"{source}: the link {href} leads to no page"
            elif target.fragment and target.fragment not in other.ids:
                yield f"{source}: the link {href} leads to no anchor"
