"""The prose of docstrings and comments, from Markdown to HTML: links set, formulas collected to be set at once."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from links import MENTION, Library, outside_link
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from source import Module, Section, literal_blocks

FORMULA = re.compile("<!--formula (\\d+)-->")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Formula:
    """TeX, on a line of its own or in a sentence, and the file and line where it is."""

    tex: str
    display: bool
    where: str


class Prose:
    """Turns prose into HTML; `formulas` and `problems` (each with file and line) gather on the way."""

    def __init__(self, library: Library) -> None:
        self.names = library
        self.formulas: list[Formula] = []
        self.problems: list[str] = []
        self.markdown = MarkdownIt("commonmark", {"html": False, "typographer": True}).enable(["smartquotes", "table"])
        self.markdown.use(dollarmath_plugin, allow_labels=False, allow_space=False, double_inline=True)
        self.markdown.inline.ruler.before("emphasis", "product", _product)
        self.markdown.core.ruler.push("mentions", self._mentions)
        self.renderer = RendererHTML()
        rules: Any = self.renderer.rules
        rules["code_inline"] = self._code
        rules |= dict.fromkeys(("math_inline", "math_inline_double", "math_block"), self._formula)

    def tokens(self, section: Section, module: Module) -> tuple[list[Token], dict[str, Any]]:
        """The Markdown of a section in pieces, and what rendering them has to know."""
        env = {"section": section, "module": module}
        return self.markdown.parse(literal_blocks(section.prose), env), env

    def render(self, tokens: list[Token], env: dict[str, Any]) -> str:
        """HTML, in which each formula is a comment with its number."""
        return self.renderer.render(tokens, self.markdown.options, env)

    def html(self, section: Section, module: Module) -> str:
        """The prose of a section."""
        return self.render(*self.tokens(section, module))

    def _where(self, env: Any, text: str) -> str:
        """File and line of the first place that has this text."""
        section: Section = env["section"]
        first = text.strip().partition("\n")[0]
        line = section.prose_line + section.prose[: max(0, section.prose.find(first))].count("\n")
        return f"{env['module'].shown_path}:{line}"

    def _formula(self, tokens: list[Token], i: int, _: Any, env: Any) -> str:
        token = tokens[i]
        self.formulas.append(
            Formula(token.content.strip(), token.type != "math_inline", self._where(env, token.content))
        )
        return f"<!--formula {len(self.formulas) - 1}-->"

    def _code(self, tokens: list[Token], i: int, _: Any, env: Any) -> str:
        text, href = tokens[i].content, None
        try:
            if not tokens[i].meta.get("linked"):
                href = self.names.prose_link(text, env["module"], env["section"])
        except LookupError as error:
            self.problems.append(f"{self._where(env, f'`{text}`')}: `{text}` leads nowhere: {error.args[0]}")
        code = f"<code>{escape(text, quote=False)}</code>"
        return f'<a href="{escape(href)}">{code}</a>' if href else code

    def _mentions(self, state: StateCore) -> None:
        """Papers, their sections, and addresses become links; a dollar sign that is left over is a mistake."""
        for token in state.tokens:
            children, depth = list[Token](), 0
            for child in token.children or []:
                depth += (child.type == "link_open") - (child.type == "link_close")
                if child.type == "link_open":  # the page of a file beside it
                    child.attrs["href"] = re.sub(r"^(\w+)\.md\b", r"\1.html", str(child.attrs["href"]))
                if child.type == "code_inline" and depth:
                    child.meta["linked"] = True
                is_text = child.type in ("text", "softbreak") and not depth
                if not is_text:
                    children.append(child)
                    continue
                text = "\n" if child.type == "softbreak" else child.content
                if children and children[-1].type == "text" and children[-1].meta.get("joined"):
                    children[-1].content += text
                else:
                    children.append(Token("text", "", 0, content=text, meta={"joined": True}))
            if token.children is not None:
                token.children = [new for child in children for new in self._linked(child, state.env)]

    def _linked(self, token: Token, env: Any) -> list[Token]:
        if not token.meta.get("joined"):
            return [token]
        if "$" in token.content:
            where = self._where(env, "$" + token.content.partition("$")[2][:8])
            self.problems.append(f"{where}: a dollar sign that neither begins nor ends a formula")
        text = token.content.replace("->", "→")
        out, end = list[Token](), 0
        for match in MENTION.finditer(text):
            out.append(Token("text", "", 0, content=text[end : match.start()]))
            out.append(Token("link_open", "a", 1, attrs={"href": outside_link(match)}))
            out.append(Token("text", "", 0, content=match[0]))
            out.append(Token("link_close", "a", -1))
            end = match.end()
        return [*out, Token("text", "", 0, content=text[end:])]


def _product(state: StateInline, silent: bool) -> bool:
    """A `*` between two letters or digits is a product, as in B*C, and begins no emphasis."""
    i = state.pos
    if state.src[i] != "*" or not 0 < i < state.posMax - 1:
        return False
    if not (state.src[i - 1].isalnum() and state.src[i + 1].isalnum()):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


def set_formulas(formulas: list[Formula]) -> tuple[list[str], list[str]]:
    """HTML of each formula, and a message for each that does not parse; one process sets them all.

    Where there is no Node.js or no KaTeX there is one message, which says what sets them up.
    """
    if not formulas:
        return [], []
    asked = json.dumps([{"tex": f.tex, "display": f.display} for f in formulas])
    try:
        done = subprocess.run(["node", HERE / "formulas.mjs"], input=asked, capture_output=True, text=True, cwd=HERE)
    except FileNotFoundError:
        return [], ["formulas are set with KaTeX: install Node.js 20 or newer (with npm), then: make docs"]
    if "ERR_MODULE_NOT_FOUND" in done.stderr:
        return [], ["formulas are set with KaTeX, which is not there yet; this installs it, then builds: make docs"]
    if done.returncode:
        return [], [f"node could not set the formulas: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
    answers = json.loads(done.stdout)
    problems = [f"{f.where}: {a['error']}, in {f.tex}" for f, a in zip(formulas, answers, strict=True) if "error" in a]
    return [a.get("html", "") for a in answers], problems
