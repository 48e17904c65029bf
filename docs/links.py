"""Where a name of the library leads: in prose by its spelling, in code by Python's own rules of scope."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from source import FUNCTION, Module, Section

PAPER = "2112.04426"  # RETRO
TUTORIAL = "https://nn.labml.ai/transformers/retro/"
TUTORIAL_PAGES = ("index", "bert_embeddings", "database", "dataset", "model", "train")
ARXIV = r"arXiv:(\d{4}\.\d{4,5})"
NUMBER = r"(?:\(\d+\)|(?:\d+|[A-Z]\b)(?:\.\d+)*)"  # as 2.2, (1) or B.1.2
PART = rf"\b(?:[Ss]ection|[Ee]quation|[Aa]lgorithm|[Ff]igure|[Tt]able|[Aa]ppendix)\s+{NUMBER}"
TUTORIAL_PAGE = rf"nn\.labml\.ai/transformers/retro(?:/(?:{'|'.join(TUTORIAL_PAGES)})\.html)?"
MENTION = re.compile(
    rf"(?P<part>{PART})(?:\s+of\s+{ARXIV})?|{ARXIV}|(?P<url>https?://[^\s<>]*[\w/])|(?P<tutorial>{TUTORIAL_PAGE})"
)


def outside_link(match: re.Match[str]) -> str:
    """Address of what `MENTION` found: a paper, RETRO unless another is named, or a page."""
    if match["url"]:
        return match["url"]
    if match["tutorial"]:
        return f"https://{match['tutorial']}"
    return f"https://arxiv.org/abs/{match[2] or match[3] or PAPER}"


class Library:
    """All modules that become pages, and what is defined in them."""

    def __init__(self, modules: list[Module], package: str = "retro") -> None:
        self.package = package
        self.modules = {module.name: module for module in modules}
        # `retro.index` may be the name of a file: then some code has it as a string.
        strings = (n.value for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.Constant))
        self.files = {value for value in strings if isinstance(value, str) and value.startswith(f"{package}.")}

    def anchor(self, module: Module, name: str) -> str | None:
        """`page#anchor` of a dotted name of a module, if it defines it or a base class does."""
        if name in module.anchors and module.name == self.package:
            return module.page  # the index, which shows no code
        if name in module.anchors:
            return f"{module.page}#{module.anchors[name]}"
        owner, _, member = name.rpartition(".")
        for base in module.classes[owner].bases if owner in module.classes else []:
            place = self.place(module, base.id) if isinstance(base, ast.Name) else None
            if place and (href := self.anchor(place[0], f"{place[1]}.{member}")):
                return href
        return None

    def place(self, module: Module, name: str) -> tuple[Module, str] | None:
        """The module that defines a global name of `module`, and its name there, through imports of imports."""
        seen = set()
        while name not in module.anchors:
            if name not in module.imports and module.name == self.package:  # which imports when it is asked
                owners = [m for m in self.modules.values() if m.defines(name)]
                return (owners[0], name) if len(owners) == 1 else None
            origin, original = module.imports.get(name, ("", ""))
            if origin not in self.modules or (origin, original) in seen:
                return None
            seen.add((origin, original))
            module, name = self.modules[origin], original
        return module, name

    def imported(self, module: Module, name: str) -> Module | None:
        """The module that a name of `module` stands for: `parallel`, after `from retro import parallel`."""
        origin, original = module.imports.get(name, ("", ""))
        return self.modules.get(f"{origin}.{original}")

    def address(self, module: Module, name: str) -> str | None:
        """`page#anchor` of a dotted name that `module` defines or imports."""
        head, _, rest = name.partition(".")
        if place := self.place(module, head):
            return self.anchor(place[0], f"{place[1]}.{rest}" if rest else place[1])
        if other := self.imported(module, head):
            return self.address(other, rest) if rest else other.page
        return None

    def prose_link(self, text: str, module: Module, section: Section) -> str | None:
        """Where a name in backticks leads; None if it is no name of the library.

        Raises `LookupError` for one that says it is, as `retro.x` or `Class.x`, and is not.
        """
        match = re.fullmatch(r"(\w+(?:\.\w+)*)(?:\(.*\))?", text, re.DOTALL)
        if match is None:
            return None
        name = match[1]
        head, _, rest = name.partition(".")
        if head == self.package:
            return self._absolute(name) if rest else None
        if section.node is not None and name in _own_names(section.node):
            return None  # its parameter or its field
        scopes = section.name.split(".")
        for n in range(len(scopes), 0, -1):
            if href := self.anchor(module, f"{'.'.join(scopes[:n])}.{name}"):
                return href
        place, href = self.place(module, head), self.address(module, name)
        if place is None and href is None and head[:1].isupper():  # a class that one other module alone has
            owners = [m for m in self.modules.values() if head in m.classes]
            place = (owners[0], head) if len(owners) == 1 else None
            href = self.address(owners[0], name) if place else None
        if href is None and (place[1] in place[0].classes if place else self.imported(module, head)):
            raise LookupError(f"{head} has no {rest}")
        return href

    def _absolute(self, name: str) -> str | None:
        parts = name.split(".")
        for n in range(len(parts), 0, -1):
            if module := self.modules.get(".".join(parts[:n])):
                if n == len(parts):
                    return module.page
                if href := self.address(module, ".".join(parts[n:])):
                    return href
                break
        if name in self.files:
            return None
        raise LookupError(f"there is no {name}")

    def code_links(self, module: Module) -> dict[tuple[int, int], str]:
        """Where the identifiers of a module lead, by line and column."""
        links: dict[tuple[int, int], str] = {}
        for line, n_bytes, name, href in self._uses(module, module.tree, "", frozenset()):
            text = module.lines[line - 1]
            column = len(text.encode()[:n_bytes].decode())
            # Python before 3.12 does not know where names inside f-strings are.
            if text[column : column + len(name)] == name:
                links[line, column] = href
        return links

    def _uses(
        self, module: Module, node: ast.AST, scope: str, bound: frozenset[str]
    ) -> Iterator[tuple[int, int, str, str]]:
        """Line, column in bytes, identifier and address of each use of a name of the library below `node`."""
        for child in ast.iter_child_nodes(node):
            inner, inside = scope, bound
            if isinstance(child, ast.ClassDef):
                inner = f"{scope}.{child.name}".lstrip(".")
            elif isinstance(child, (*FUNCTION, ast.Lambda)):
                inside = bound | _bound(child)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and child.id not in bound:
                own = self.place(module, child.id) == (module, child.id)
                if not (own and _is_variable(module, child.id)) and (href := self.address(module, child.id)):
                    yield child.lineno, child.col_offset, child.id, href
            elif isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
                value, href = child.value.id, None
                if value == "self":
                    href = self.anchor(module, f"{scope}.{child.attr}")
                elif value not in bound:
                    href = self.address(module, f"{value}.{child.attr}")
                if href:
                    line, end = child.end_lineno or child.lineno, child.end_col_offset or 0
                    if href != f"{module.page}#L{line}":  # where it is set
                        yield line, end - len(child.attr.encode()), child.attr, href
            elif isinstance(child, ast.alias) and (href := self.address(module, child.asname or child.name)):
                yield child.lineno, child.col_offset, child.name, href
            yield from self._uses(module, child, inner, inside)


def _is_variable(module: Module, name: str) -> bool:
    """Whether a global name is a script's variable: no definition, no constant in capitals."""
    return module.anchors[name].startswith("L") and name.islower()


def _bound(function: ast.AST) -> frozenset[str]:
    """Names that are local to a function; what it imports is not among them."""
    names = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    names |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return frozenset(names | {n.name for n in ast.walk(function) if isinstance(n, FUNCTION) and n is not function})


def _own_names(node: ast.AST) -> set[str]:
    """Parameters of a function, or of a class' `__init__`, and the fields of a class."""
    names: set[str] = set()
    if isinstance(node, FUNCTION):
        a = node.args
        names = {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x}
    elif isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, FUNCTION) and child.name == "__init__":
                names |= _own_names(child)
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                names.add(child.target.id)
    return names
