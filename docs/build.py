"""`make docs`: the library as pages to read, prose on the left, the code it speaks of on the right.

Every module of `retro/`, and every example, becomes a page of `site/`. The pages need no network and
no script. The build fails, and writes nothing, if a link leads nowhere, a formula does not parse, or
something public has no prose.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from check import broken_links, problems_of
from links import TUTORIAL, TUTORIAL_PAGES, Library
from markdown_it.token import Token
from prose import FORMULA, HERE, Prose, set_formulas
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

# The order to read in: each part needs those before it.
READING_ORDER = {
    "The way of the data": (
        "corpus", "tokenizer", "bert_embeddings", "keys", "faiss_index", "database", "living", "model", "dataset",
        "sample", "evaluate", "report", "train",
    ),
    "Around it": (
        "artifacts", "shards", "weights", "distributed", "plan", "presets", "commands", "run_commands", "device",
    ),
    "Using it": ("docs/at_scale.md",),
    "Worked examples": ("examples/own_text.py", "examples/compare_with_reference.py"),
}  # fmt: skip
COLORS = {
    Comment: "c", String: "s", Number: "m", Keyword: "k", Operator.Word: "k", Name.Function: "f", Name.Class: "f",
    Name.Decorator: "d", Name.Builtin: "b", Name.Exception: "b",
}  # fmt: skip


class DocsError(Exception):
    """What is wrong with the sources, a line for each."""


def load(root: Path, order: dict[str, tuple[str, ...]]) -> list[Module]:
    """The package (its `__init__.py` is the index) and all modules of the reading order."""
    modules = [Module(root / "retro" / "__init__.py", "retro", "index.html", "retro/__init__.py")]
    for entry in (entry for part in order.values() for entry in part):
        if entry.endswith(".md"):
            modules.append(prose_page(root / entry, entry))
            continue
        path = root / (entry if entry.endswith(".py") else f"retro/{entry}.py")
        name = path.stem if entry.endswith(".py") else f"retro.{entry}"
        modules.append(Module(path, name, f"{path.stem}.html", path.relative_to(root).as_posix()))
    return modules


def prose_page(path: Path, shown_path: str) -> Module:
    """A page of prose alone: Markdown whose first line is its title, taken for a module that is all docstring."""
    title, _, text = path.read_text(encoding="utf-8").partition("\n")
    return Module(path, title.lstrip("# "), f"{path.stem}.html", shown_path, f'r"""{text.strip()}\n"""\n')


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


def code_block(section: Section, lines: dict[int, str]) -> str:
    """The code beside a section's prose, line by line, each with its number."""
    if not section.code:
        return ""
    rows = (
        f'<span class="line" id="L{n}"><a class="n" href="#L{n}" tabindex="-1">{n}</a>{lines[n]}\n</span>'
        for n in section.code
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
    """Public classes and functions of a page, methods below their classes."""
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
    return f'<nav class="contents" aria-label="On this page"><h2>On this page</h2><ul>{html}</ul></nav>' if rows else ""


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
    sections = module.sections()
    if module.shown_path.endswith(".md"):  # prose alone, in one column
        text = f"<h1>{module.name}</h1>{prose.html(sections[0], module)}"
        return f'<section class="index" data-source="{module.shown_path}:1">{text}</section>'
    lines = code_lines(module, library.code_links(module))
    rows = []
    for i, section in enumerate(sections):
        text, code = heading(section), code_block(section, lines)
        if i == 0:
            text, code = f"<h1>{breakable(module.name)}</h1>{tutorial_link(module)}", contents(sections) + code
        if section.inherited:
            href = library.anchor(module, section.inherited)
            text += f'<p class="aside">as <a href="{href}"><code>{section.inherited}</code></a></p>'
        rows.append(row(module, section, text + prose.html(section, module), code))
    return "".join(rows)


def tutorial_link(module: Module) -> str:
    """A link to the page of the tutorial that a module mirrors, if there is one."""
    name = "index" if module.name == "retro" else module.name.removeprefix("retro.")
    if name not in TUTORIAL_PAGES:
        return ""
    return f'<p class="aside">in the tutorial: <a href="{TUTORIAL}{name}.html">{name}.html</a></p>'


def index_page(modules: list[Module], order: dict[str, tuple[str, ...]], prose: Prose, drawing: str) -> str:
    """The package's docstring; its drawing becomes a diagram, its list of modules the list of all pages."""
    package, rest = modules[0], iter(modules[1:])
    section = package.sections()[0]
    tokens, env = prose.tokens(section, package)
    parts = []
    for part, entries in order.items():
        items = []
        for _ in entries:
            module = next(rest)
            first = Section(1, summary(module), 1)
            line = prose.html(first, module).removeprefix("<p>").removesuffix("</p>\n")
            items.append(f'<li><a href="{module.page}">{module.name}</a><span>{line}</span></li>')
        parts.append(f"<h2>{part}</h2><ol>{''.join(items)}</ol>" if items else "")
    source = f"{package.shown_path}:1"
    figure = f'<figure class="pipeline" data-source="docs/pipeline.svg:1">{drawing}</figure>' if drawing else ""
    pages = f'<div class="pages" data-source="{source}">{"".join(parts)}</div>'
    text = prose.render(_replaced(tokens, figure, pages), env)
    return (
        f'<section class="index" data-source="{source}"><h1>{package.name}</h1>{tutorial_link(package)}{text}</section>'
    )


def summary(module: Module) -> str:
    """The first sentence of a module."""
    paragraph = module.docstring(module.tree).partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.:])\s(?=[A-Z`]|$)", paragraph)[0].rstrip(".:")


def _replaced(tokens: list[Token], figure: str, pages: str) -> list[Token]:
    """Tokens in which the first literal block is a figure, and the list that begins with a module the list of pages."""
    out, skipping, found = list[Token](), False, {"figure": False, "pages": False}
    for i, token in enumerate(tokens):
        if token.type == "fence" and figure and not found["figure"]:
            out.append(Token("html_block", "", 0, content=figure))
            found["figure"] = True
        elif token.type == "bullet_list_open" and not found["pages"]:
            inline = next(t for t in tokens[i:] if t.type == "inline")
            skipping = inline.content.startswith("`retro.")
            found["pages"] = skipping
            out.append(Token("html_block", "", 0, content=pages) if skipping else token)
        elif not skipping:
            out.append(token)
        if token.type == "bullet_list_close" and token.level == 0:
            skipping = False
    for name, html in (("figure", figure), ("pages", pages)):
        out += [] if found[name] else [Token("html_block", "", 0, content=html)]
    return out


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
<a class="skip" href="#main">Skip to the content</a>
<header>{home}<nav aria-label="Pages">{"".join(steps)}</nav></header>
<main id="main" tabindex="-1">
{body}</main>
<footer><nav aria-label="Pages, again">{"".join(steps)}</nav></footer>
</body>
</html>
"""


def build(root: Path, out: Path, order: dict[str, tuple[str, ...]] | None = None) -> dict[str, int]:
    """Write the site of the library in `root` into the folder `out`; returns the number of formulas of each page.

    Raises `DocsError` if anything is wrong with the sources; `out` is then as it was.
    """
    order = READING_ORDER if order is None else order
    modules = load(root, order)
    library = Library(modules)
    prose = Prose(library)
    problems = list(problems_of(root, modules))
    svg = root / "docs" / "pipeline.svg"
    drawing = svg.read_text(encoding="utf-8") if svg.exists() else ""
    bodies = [index_page(modules, order, prose, drawing), *(module_page(m, library, prose) for m in modules[1:])]
    html, wrong = set_formulas(prose.formulas)
    problems += prose.problems + wrong
    documents = {m.page: document(modules, i, body) for i, (m, body) in enumerate(zip(modules, bodies, strict=True))}
    n_formulas = {page: len(FORMULA.findall(text)) for page, text in documents.items()}
    pages = {page: FORMULA.sub(lambda match: html[int(match[1])], text) for page, text in documents.items()}
    problems += broken_links(pages)
    if problems:
        raise DocsError("\n".join(dict.fromkeys(problems)))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for page, text in pages.items():
        (out / page).write_text(text, encoding="utf-8")
    shutil.copy(HERE / "style.css", out)
    katex = HERE / "node_modules" / "katex" / "dist"
    if any(n_formulas.values()):
        (out / "katex" / "fonts").mkdir(parents=True)
        shutil.copy(katex / "katex.min.css", out / "katex")
        for font in katex.glob("fonts/*.woff2"):
            shutil.copy(font, out / "katex" / "fonts")
    return n_formulas


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: `python docs/build.py [--out DIR]`."""
    parser = argparse.ArgumentParser(description="Write the annotated pages of the library.")
    parser.add_argument("--out", type=Path, default=HERE.parent / "site", help="folder of the pages (default: site)")
    out = parser.parse_args(argv).out
    try:
        n_formulas = build(HERE.parent, out)
    except DocsError as error:
        print(f"{error}\nno pages were written", file=sys.stderr)
        return 1
    print(f"{len(n_formulas)} pages with {sum(n_formulas.values())} formulas: open {out}/index.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
