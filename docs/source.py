"""Python source as an annotated page sees it: prose, the code it speaks of, and where names are defined.

`ast` says where definitions and docstrings are, `tokenize` which lines are comments; so a `#` in a
string is no comment, and a string that happens to stand somewhere is no docstring.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (ast.ClassDef, *FUNCTION)
PRAGMA = re.compile(r"#(!|\s*(fmt|type|noqa|ruff|mypy|pragma)\b)")  # said to a tool


@dataclass
class Section:
    """Prose and the lines of code beside it."""

    line: int  # where it begins in the file, from 1
    prose: str = ""  # Markdown
    prose_line: int = 0  # where that begins
    inherited: str = ""  # the method whose prose this is, if it has none of its own
    name: str = ""  # what is defined here, as `Class.method`
    anchor: str = ""  # the name, and a number if the same is defined again (overloads, setters)
    node: Definition | None = None
    code: list[int] = field(default_factory=list)  # numbers of the lines


@dataclass(frozen=True)
class Found:
    """A definition: the node, its dotted name, and whether it is inside a function."""

    node: Definition
    name: str
    nested: bool


class Module:
    """A file of the library: `name` is what it is imported as, `page` the page it becomes."""

    def __init__(self, path: Path, name: str, page: str, shown_path: str, source: str | None = None) -> None:
        self.name, self.page, self.shown_path = name, page, shown_path
        self.source = path.read_text(encoding="utf-8") if source is None else source
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)
        self.found = list(definitions(self.tree))
        self.classes = {f.name: f.node for f in self.found if isinstance(f.node, ast.ClassDef)}
        self.anchors = self._anchors()
        self.imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    def defines(self, name: str) -> bool:
        """Whether a class or function of this name stands at the top level."""
        return any(found.name == name for found in self.found if not found.nested)

    def last_import(self) -> int:
        """The last line of the imports that a module begins with; 0 if it begins with anything else."""
        last = 0
        for statement in self.tree.body:
            if isinstance(statement, DEFINITION):
                break
            if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(statement)):
                last = statement.end_lineno or statement.lineno
            elif statement is not self.tree.body[0] or not self.docstring(self.tree):
                break
        return last

    def _anchors(self) -> dict[str, str]:
        """Where things are: definitions by name; constants, fields and attributes by line."""
        anchors = {
            f.name: f"L{f.node.lineno}" if self._is_of_its_class(f) else f.name for f in self.found if not f.nested
        }
        for statement in self.tree.body:
            for name in _assigned(statement):
                anchors.setdefault(name, f"L{statement.lineno}")
        for name, node in self.classes.items():
            for statement in node.body:
                for target in _assigned(statement):
                    anchors.setdefault(f"{name}.{target}", f"L{statement.lineno}")
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value):
                    anchors.setdefault(f"{name}.{inner.attr}", f"L{inner.lineno}")
        return anchors

    def docstring(self, node: Definition | ast.Module) -> str:
        """A docstring, dedented; empty if there is none."""
        return ast.get_docstring(node) or ""

    def documented_by(self, found: Found) -> tuple[str, str]:
        """The prose of a definition, and whose it is: its own, or that of the method which it implements."""
        same = [f for f in self.found if f.name == found.name]  # overloads share it
        if own := next((d for d in (self.docstring(f.node) for f in same) if d), ""):
            return self.docstring(found.node) or own, found.name
        owner, _, method = found.name.rpartition(".")
        for base in self._implemented(owner) if owner in self.classes else []:
            for f in self.found:
                if f.name == f"{base}.{method}" and (prose := self.docstring(f.node)):
                    return prose, f.name
        return "", ""

    def _implemented(self, name: str) -> list[str]:
        """Classes of this module that a class derives from, and protocols of which it has all methods and properties.

        A property may be an attribute of the class.
        """
        bases = [base.id for base in self.classes[name].bases if isinstance(base, ast.Name) and base.id in self.classes]
        for other, node in self.classes.items():
            asked = {f.name for f in node.body if isinstance(f, FUNCTION)}
            is_protocol = any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
            has = {f.name for f in self.classes[name].body if isinstance(f, FUNCTION)}
            assigned = [target for n in self.classes[name].body if isinstance(n, ast.Assign) for target in n.targets]
            has |= {target.id for target in assigned if isinstance(target, ast.Name)}
            if other != name and is_protocol and asked and asked <= has:
                bases.append(other)
        return bases

    def _is_of_its_class(self, found: Found) -> bool:
        """Whether the prose of the class speaks for a method: an `__init__` without its own that comes first."""
        owner, _, method = found.name.rpartition(".")
        if owner not in self.classes or not re.fullmatch("__.+__", method) or self.documented_by(found)[0]:
            return False
        return found.node is next(f for f in self.classes[owner].body if isinstance(f, FUNCTION))

    def undocumented(self) -> Iterator[tuple[int, str]]:
        """Line and name of each public definition without prose, the module (line 1) included."""
        if not self.docstring(self.tree):
            yield 1, self.name
        for found in self.found:
            is_public = not any(part.startswith("_") for part in found.name.split("."))
            if is_public and not found.nested and not self.documented_by(found)[0]:
                yield found.node.lineno, found.name

    def sections(self) -> list[Section]:
        """The file in pieces, in order: each line of it is in one of them, as prose or as code, or is blank."""
        prose_lines: set[int] = set()
        begins = {1: Section(1, self.docstring(self.tree), 1)}
        prose_lines |= self._docstring_lines(self.tree)
        counts: dict[str, int] = {}
        for found in self.found:
            node = found.node
            own = self._docstring_lines(node)
            if (found.nested and not own) or self._is_of_its_class(found):
                continue
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            section = Section(start, node=node)
            if found.nested:
                section.prose = self.docstring(node)
            else:
                prose, whose = self.documented_by(found)
                counts[found.name] = count = counts.get(found.name, 0) + 1
                section.prose = prose if whose != found.name else self.docstring(node)
                section.inherited = whose if whose != found.name else ""
                section.name, section.anchor = found.name, found.name if count == 1 else f"{found.name}-{count}"
            section.prose_line = min(own, default=start)
            begins[start] = section
            prose_lines |= own
            begins.setdefault((node.end_lineno or start) + 1, Section((node.end_lineno or start) + 1))
        for first, texts in comment_blocks(self.source):
            begins[first] = Section(first, "\n".join(texts), first)
            prose_lines |= set(range(first, first + len(texts)))
        section = begins[1]
        for number, line in enumerate(self.lines, start=1):
            section = begins.get(number, section)
            # A docstring leaves no gap behind.
            if number not in prose_lines and (line.strip() or section.code[-1:] == [number - 1]):
                section.code.append(number)
        ordered = list({id(s): s for _, s in sorted(begins.items(), key=lambda item: item[0])}.values())
        for section in ordered:
            while section.code and not self.lines[section.code[-1] - 1].strip():
                section.code.pop()
        return [s for s in ordered if s.prose or s.code or s.line == 1]

    def _docstring_lines(self, node: Definition | ast.Module) -> set[int]:
        """Lines that hold a docstring and nothing else."""
        if not self.docstring(node):
            return set()
        string = node.body[0]
        end = string.end_lineno or string.lineno
        before = self.lines[string.lineno - 1].encode()[: string.col_offset]
        after = self.lines[end - 1].encode()[string.end_col_offset :]
        return set() if before.strip() or after.strip() else set(range(string.lineno, end + 1))


def definitions(node: ast.AST, scope: str = "", nested: bool = False) -> Iterator[Found]:
    """Classes and functions below a node, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITION):
            yield Found(child, scope + child.name, nested)
            yield from definitions(child, f"{scope}{child.name}.", nested or isinstance(child, FUNCTION))
        else:
            yield from definitions(child, scope, nested)


def comment_blocks(source: str) -> Iterator[tuple[int, list[str]]]:
    """First line and text of each run of comments that have their lines to themselves.

    Those inside brackets stay code: they speak of one argument, and would tear its expression apart.
    """
    depth, first, texts, column = 0, 0, list[str](), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if (
            token.type != tokenize.COMMENT
            or depth
            or token.line[: token.start[1]].strip()
            or PRAGMA.match(token.string)
        ):
            continue
        if texts and (token.start[0], token.start[1]) != (first + len(texts), column):
            yield first, texts
            texts = []
        if not texts:
            first, column = token.start
        texts.append(token.string.removeprefix("#").removeprefix(" "))
    if texts:
        yield first, texts


def literal_blocks(prose: str) -> str:
    """reStructuredText's literal blocks (`::` and an indented block) as Markdown's, other lines as they are."""
    out, lines = list[str](), prose.split("\n")
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        start = next((j for j in range(i, len(lines)) if lines[j].strip()), i)
        indent = len(line) - len(line.lstrip())
        is_literal = line.endswith("::") and start > i and start < len(lines) and _indent(lines[start]) > indent
        if not is_literal:
            out.append(line)
            continue
        end = next(
            (j for j in range(start, len(lines)) if lines[j].strip() and _indent(lines[j]) <= indent), len(lines)
        )
        block = inspect.cleandoc("\n" + "\n".join(lines[start:end])).rstrip().split("\n")
        out.append(line[:-1].rstrip() if line[:-2].strip() else "")
        out += [" " * indent + row for row in ("```text", *block, "```")]
        i = end
    return "\n".join(out)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _assigned(statement: ast.stmt) -> list[str]:
    """Names that an assignment gives a value, or a type."""
    if isinstance(statement, ast.Assign):
        targets = [
            t for target in statement.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    else:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
