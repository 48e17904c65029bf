"""`make docs`: the library as pages to read, prose on the left, the code it speaks of on the right.

Every module of `retro/`, and every example, becomes a page of `site/`. The pages need no network and
no script. The build fails, and writes nothing, if a link leads nowhere, a formula does not parse, or
something public has no prose.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from check import broken_links, problems_of
from index import Parts, index_page
from links import Library
from pages import document, module_page
from prose import FORMULA, HERE, Prose, set_formulas
from source import Module

# The order to read in: the tutorial's five modules as it has them, then each part with those that it needs before it.
# `folder/*` stands for the modules of a folder that are not named, by name.
READING_ORDER = {
    "The tutorial's five modules": ("bert_embeddings", "database", "model", "dataset", "train"),
    "A memory for a pretrained model": (
        "retrofit", "bases/readers", "bases/layers", "in_context", "causal_lm", "cached_text", "model_card",
    ),
    "Writing and measuring": ("sample", "decoding", "evaluate"),
    "The explorer": ("explorer/writing", "explorer/explored", "explorer/page"),
    "Behind the scenes: Settings and errors": ("config", "errors"),
    "Behind the scenes: Text": ("text/documents", "text/split", "text/tokenizer", "text/corpus", "text/*"),
    "Behind the scenes: Search": (
        "search/keys", "search/factory", "search/filling", "search/querying", "search/recall", "search/*",
    ),
    "Behind the scenes: Storage": ("storage/files", "storage/manifests", "storage/shards", "storage/*"),
    "Behind the scenes: Runs": ("runs/data", "runs/engine", "runs/loop", "runs/checkpoints", "runs/*"),
    "Behind the scenes: Evaluation": (
        "evaluation/held_out", "evaluation/windows", "evaluation/rivals", "evaluation/knn_lm", "evaluation/costs",
        "evaluation/leakage", "evaluation/result", "evaluation/intervals",
        "evaluation/*",
    ),
    "Behind the scenes: Planning": ("planning/*",),
    "Behind the scenes: Chunks, attention, first weights, processes, devices, progress": (
        "chunks", "attention", "initialization", "loss", "parallel", "cluster", "device", "progress",
    ),
    "Behind the scenes: The command line": ("cli/*", "__main__"),
    "Guides": (
        "docs/your_text.md", "docs/a_memory.md", "docs/retrievers.md", "docs/at_scale.md", "docs/speed.md",
        "docs/tutorial.md", "docs/claims.md", "docs/mutants.md", "docs/glossary.md",
    ),
    "Worked examples": (
        "examples/own_text.py", "examples/own_retriever.py", "examples/lm_eval_task.py",
        "examples/compare_with_reference.py",
    ),
}  # fmt: skip


class DocsError(Exception):
    """What is wrong with the sources, a line for each."""


def load(root: Path, order: dict[str, tuple[str, ...]]) -> tuple[Module, Parts, list[Module]]:
    """The package (its `__init__.py` is the index), the modules of the reading order, and the wings.

    A wing is a sub-package whose `__init__.py` is a docstring alone: the index shows it, and it has no page.
    """
    package, parts = Module(root / "retro" / "__init__.py", "retro", "index.html", "retro/__init__.py"), Parts()
    named = {entry for entries in order.values() for entry in entries}
    try:
        for part, entries in order.items():
            parts[part] = [module for entry in entries for module in pages_of(root, entry, named)]
    except FileNotFoundError as error:
        raise DocsError(f"docs/build.py:1: {error.filename} is in the reading order, but not there") from None
    wings = [path for path in sorted((root / "retro").glob("*/**/__init__.py")) if is_wing(path)]
    return package, parts, [wing_of(root, path) for path in wings]


def pages_of(root: Path, entry: str, named: set[str]) -> list[Module]:
    """What an entry of the reading order stands for; `named` are all entries."""
    if entry.endswith(".md"):
        return [prose_page(root / entry, entry)]
    if entry.endswith(".py"):
        path = root / entry
        return [Module(path, path.stem, f"{path.stem}.html", entry)]
    if entry.endswith("/*"):
        found = [path for path in sorted((root / "retro").glob(f"{entry}.py")) if not is_wing(path)]
        names = [f"{entry[:-1]}{path.stem}" for path in found]
        return [package_page(root, name) for name in names if name not in named]
    return [package_page(root, entry)]


def package_page(root: Path, entry: str) -> Module:
    """The module `text/corpus` of the package: `retro.text.corpus`, which becomes `text.corpus.html`."""
    dotted = entry.replace("/", ".").removesuffix(".__init__")
    return Module(root / "retro" / f"{entry}.py", f"retro.{dotted}", f"{dotted}.html", f"retro/{entry}.py")


def is_wing(path: Path) -> bool:
    """Whether a file is the `__init__.py` of a sub-package, with nothing in it but a docstring."""
    if path.name != "__init__.py":
        return False
    return all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


def wing_of(root: Path, path: Path) -> Module:
    """A sub-package, which is found on the index, under the heading of its part."""
    name = ".".join(path.parent.relative_to(root).parts)
    return Module(path, name, f"index.html#{name}", path.relative_to(root).as_posix())


def prose_page(path: Path, shown_path: str) -> Module:
    """A page of prose alone: Markdown whose first line is its title, taken for a module that is all docstring."""
    title, _, text = path.read_text(encoding="utf-8").partition("\n")
    return Module(path, title.lstrip("# "), f"{path.stem}.html", shown_path, f'r"""{text.strip()}\n"""\n')


def build(root: Path, out: Path, order: dict[str, tuple[str, ...]] | None = None) -> dict[str, int]:
    """Write the site of the library in `root` into the folder `out`; returns the number of formulas of each page.

    Raises `DocsError` if anything is wrong with the sources; `out` is then as it was.
    """
    order = READING_ORDER if order is None else order
    package, parts, wings = load(root, order)
    modules = [package, *(module for part in parts.values() for module in part)]
    library = Library([*modules, *wings])
    prose = Prose(library)
    problems = list(problems_of(root, [*modules, *wings]))
    svg = root / "docs" / "pipeline.svg"
    drawing = svg.read_text(encoding="utf-8") if svg.exists() else ""
    bodies = [index_page(package, parts, wings, prose, drawing)]
    bodies += [module_page(module, library, prose) for module in modules[1:]]
    html, wrong = set_formulas(prose.formulas)
    problems += prose.problems + wrong
    documents = {m.page: document(modules, i, body) for i, (m, body) in enumerate(zip(modules, bodies, strict=True))}
    n_formulas = {page: len(FORMULA.findall(text)) for page, text in documents.items()}
    problems += broken_links(documents)
    if problems:
        raise DocsError("\n".join(dict.fromkeys(problems)))
    pages = {page: FORMULA.sub(lambda match: html[int(match[1])], text) for page, text in documents.items()}
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
