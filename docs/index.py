"""The front page: what the library is, drawn, and all pages in the order to read them in."""

from __future__ import annotations

from markdown_it.token import Token
from pages import summary, tutorial_link
from prose import Prose
from source import Module, Section

Parts = dict[str, list[Module]]  # the pages of each part, in order


def index_page(package: Module, parts: Parts, wings: list[Module], prose: Prose, drawing: str) -> str:
    """The package's docstring; its drawing becomes a diagram, its list of modules the list of all pages.

    * `wings` are the sub-packages whose `__init__.py` is a docstring alone: it opens the part of their modules
    """
    section = package.sections()[0]
    tokens, env = prose.tokens(section, package)
    source = f"{package.shown_path}:1"
    figure = f'<figure class="pipeline" data-source="docs/pipeline.svg:1">{drawing}</figure>' if drawing else ""
    pages = f'<div class="pages" data-source="{source}">{list_of_pages(parts, wings, prose)}</div>'
    text = prose.render(_replaced(tokens, figure, pages), env)
    return (
        f'<section class="index" data-source="{source}"><h1>{package.name}</h1>{tutorial_link(package)}{text}</section>'
    )


def list_of_pages(parts: Parts, wings: list[Module], prose: Prose) -> str:
    """Each part with its pages; parts named `Group: part` share the heading of their group."""
    out, above, left = list[str](), "", list(wings)
    for title, modules in parts.items():
        if not modules:
            continue
        group, _, name = title.partition(": ")
        out.append(f"<h2>{group}</h2>" if group != above else "")
        out.append(f"<h3>{name}</h3>" if name else "")
        above = group
        for wing in [w for w in left if any(m.name.startswith(f"{w.name}.") for m in modules)]:
            left.remove(wing)
            text = first_line(wing, prose, name or group)
            out.append(f'<p class="aside" id="{wing.name}" data-source="{wing.shown_path}:1">{text}</p>')
        lines = (f'<span data-source="{m.shown_path}:1">{first_line(m, prose)}</span>' for m in modules)
        items = (f'<li><a href="{m.page}">{m.name}</a>{line}</li>' for m, line in zip(modules, lines, strict=True))
        out.append(f"<ol>{''.join(items)}</ol>")
    return "".join(out)


def first_line(module: Module, prose: Prose, heading: str = "") -> str:
    """The first sentence of a module, as HTML, without a `heading` above it that it begins with."""
    line = summary(module).removeprefix(f"{heading}: ")
    html = prose.html(Section(1, line[:1].upper() + line[1:], 1), module)
    return html.removeprefix("<p>").removesuffix("</p>\n")


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
