"""A module as a page: its idea first, then prose on the left and the code it speaks of on the right."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from html import escape

from links import TUTORIAL, TUTORIAL_PAGES, Library
from prose import FORMULA, Prose
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]
from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    String,
)
from source import Module, Section

COLORS = {
    Comment: "c", String: "s", Number: "m", Keyword: "k", Operator.Word: "k", Name.Function: "f", Name.Class: "f",
    Name.Decorator: "d", Name.Builtin: "b", Name.Exception: "b",
}  # fmt: skip
LONG = 700  # characters of prose, from which on a page's idea is set in two columns


def code_lines(module: Module, links: dict[tuple[int, int], str]) -> dict[int, str]:
    """HTML of each line of a module, colored, identifiers linked."""
    out, line, column = {1: ""}, 1, 0
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(module.source):
        css = next((COLORS[k] for k in reversed(kind.split()) if k in COLORS), "")
        for i, text in enumerate(value.split("\n")):
            if i:
                line, column = line + 1, 0
                out[line] = ""
            at = 1 if text.startswith("@") else 0
            html = escape(text, quote=False)
            href = links.get((line, column + at))
            if href and kind in Name:
                html = f'{html[:at]}<a href="{escape(href)}">{html[at:]}</a>'
            if css and text:
                html = f'<span class="{css}">{html}</span>'
            out[line] += html
            column += len(text)
    return out


def code_block(numbers: Sequence[int], lines: dict[int, str]) -> str:
    """The code beside a section's prose, line by line, each with its number."""
    if not numbers:
        return ""
    rows = (
        f'<span class="line" id="L{n}"><a class="n" href="#L{n}" tabindex="-1">{n}</a>{lines[n]}\n</span>'
        for n in numbers
    )
    return f"<pre><code>{''.join(rows)}</code></pre>"


def heading(section: Section) -> str:
    """The name that a section defines, as a heading that links to itself."""
    owner, _, name = section.name.rpartition(".")
    kind = "class " if isinstance(section.node, ast.ClassDef) else f"{owner}." if owner else ""
    if not (name and section.anchor):
        return ""
    level, css = 3 if owner else 2, "" if section.prose else ' class="plain"'
    title = f'<span class="kind">{kind}</span>{breakable(name)}'
    return f'<h{level}{css}><a href="#{section.anchor}">{title}</a></h{level}>'


def breakable(name: str) -> str:
    """A name that may go on in the next line after an underscore."""
    return re.sub("(?<=[a-z0-9])_(?=[a-z0-9])", "_<wbr>", name)


def contents(sections: Sequence[Section]) -> str:
    """Public classes and functions of a page, methods below their classes, to be unfolded."""
    entries = [
        s for s in sections if s.anchor == s.name and s.name and s.prose and not re.search(r"(^|\.)_(?!_)", s.name)
    ]
    rows: list[str] = []
    for i, section in enumerate(entries):
        depth = section.name.count(".")
        above = entries[i - 1].name.count(".") if i else 0
        rows += ["<ul>"] * (depth - above) + ["</ul>"] * (above - depth)
        rows.append(f'<li><a href="#{section.anchor}"><code>{section.name.rpartition(".")[2]}</code></a></li>')
    # A nested list belongs into the item before it.
    html = "".join(rows).replace("</li><ul>", "<ul>").replace("</ul><li>", "</ul></li><li>")
    html += "</ul></li>" * (entries[-1].name.count(".") if entries else 0)
    if not rows:
        return ""
    return (
        '<nav class="contents" aria-label="On this page"><details><summary>On this page</summary>'
        f"<ul>{html}</ul></details></nav>"
    )


def opening(module: Module, prose: str, contents: str) -> str:
    """What a page begins with: its name, what is on it, and its idea over the whole width.

    So the first definition comes soon: on a screen of 1440 x 900, 35 lines of docstring leave room for it.
    """
    long = " long" if len(re.sub("<[^>]*>", "", prose)) > LONG else ""
    return (
        f'<section class="opening" data-source="{module.shown_path}:1">\n'
        f'<div class="title"><h1>{breakable(module.name)}</h1>{tutorial_link(module)}{contents}</div>\n'
        f'<div class="prose idea{long}">{prose}</div>\n</section>\n'
    )


def before_definitions(module: Module, section: Section, lines: dict[int, str]) -> str:
    """The code of a module's first section: its imports, to be unfolded, and what follows them."""
    if not section.code:
        return ""
    last = module.last_import()
    folded = [n for n in section.code if n <= last]
    rest = [n for n in section.code if n > last]
    while folded and rest and not module.lines[rest[0] - 1].strip():
        folded.append(rest.pop(0))
    code = code_block(rest, lines)
    if folded:
        code = f'<details class="imports"><summary>imports</summary>{code_block(folded, lines)}</details>{code}'
    return row(module, Section(section.code[0]), "", code)


def row(module: Module, section: Section, prose: str, code: str) -> str:
    """A section of the page: prose, and beside it (on a phone, below it) code."""
    anchor = f' id="{section.anchor}"' if section.anchor else ""
    bare = "" if prose else " bare"
    source = f"{module.shown_path}:{section.prose_line or section.line}"
    return (
        f'<section class="row{bare}"{anchor} data-source="{source}">\n<div class="prose">{prose}</div>\n'
        f'<div class="code">{code}</div>\n</section>\n'
    )


def module_page(module: Module, library: Library, prose: Prose) -> str:
    """Everything between the header and the footer of a module's page."""
    first, *others = module.sections()
    if module.shown_path.endswith(".md"):  # prose alone, in one column
        text = f"<h1>{module.name}</h1>{prose.html(first, module)}"
        return f'<section class="index" data-source="{module.shown_path}:1">{text}</section>'
    lines = code_lines(module, library.code_links(module))
    rows = [opening(module, prose.html(first, module), contents(others))]
    rows.append(before_definitions(module, first, lines))
    for section in others:
        text = heading(section)
        if section.inherited:
            href = library.anchor(module, section.inherited)
            text += f'<p class="aside">as <a href="{href}"><code>{section.inherited}</code></a></p>'
        rows.append(row(module, section, text + prose.html(section, module), code_block(section.code, lines)))
    return "".join(rows)


def tutorial_link(module: Module) -> str:
    """A link to the page of the tutorial that a module mirrors, if there is one."""
    name = "index" if module.name == "retro" else module.name.removeprefix("retro.")
    if name not in TUTORIAL_PAGES:
        return ""
    return f'<p class="aside">in the tutorial: <a href="{TUTORIAL}{name}.html">{name}.html</a></p>'


def summary(module: Module) -> str:
    """The first sentence of a module."""
    paragraph = module.docstring(module.tree).partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.:])\s(?=[A-Z`]|$)", paragraph)[0].rstrip(".:")


def document(modules: list[Module], i: int, body: str) -> str:
    """A whole page."""
    module = modules[i]
    title = "RETRO, annotated" if i == 0 else f"{module.name} · RETRO, annotated"
    steps = []
    for j, relation, text in ((i - 1, "prev", "← {}"), (i + 1, "next", "{} →")):
        if 0 <= j < len(modules):
            steps.append(f'<a rel="{relation}" href="{modules[j].page}">{text.format(modules[j].name)}</a>')
    home = "" if i == 0 else '<a class="home" href="index.html">RETRO, annotated</a>'
    formulas = '<link rel="stylesheet" href="katex/katex.min.css">\n' if FORMULA.search(body) else ""
    description = escape(re.sub(r"[`$\\]", "", summary(module)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="{description}">
<title>{title}</title>
<link rel="icon" href="data:,">
{formulas}<link rel="stylesheet" href="style.css">
</head>
<body>
<a class="skip" href="#whole-page">Skip to the content</a>
<header>{home}<nav aria-label="Pages">{"".join(steps)}</nav></header>
<main id="whole-page" tabindex="-1">
{body}</main>
<footer><nav aria-label="Pages, again">{"".join(steps)}</nav></footer>
</body>
</html>
"""
