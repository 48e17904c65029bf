"""`retro add` and `retro remove`: documents come to a database and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import Namespace

from retro.cli.options import data_path_of, new_parser
from retro.progress import note

NAMES = "names of documents; FILE.jsonl takes out all its records, FOLDER/ all documents below it"
N_NAMED = 5  # removed documents; the others are counted


def add_command(argv: Sequence[str]) -> None:
    """Add documents to a database."""
    what = ("TEXT", "files to add, or folders of them")
    options = _options(argv, "add", "Add documents to a database, embedding only them.", *what)
    from retro.search.updates import add_documents
    from retro.text.documents import search_texts

    if passed_over := str(search_texts(options.documents)[1]):
        note(f"passed over: {passed_over}")
    _change(options, add_documents)


def remove_command(argv: Sequence[str]) -> None:
    """Take documents out of a database."""
    options = _options(argv, "remove", "Take documents out of a database.", "NAME", NAMES)
    from retro.search.updates import remove_documents

    _change(options, remove_documents)


def _options(argv: Sequence[str], command: str, description: str, named: str, what: str) -> Namespace:
    parser = new_parser(command, description)
    parser.add_argument("documents", metavar=named, nargs="+", type=str, help=what)
    return parser.parse_args(list(argv))


def _change(options: Namespace, change: Callable[..., dict[str, Any]]) -> None:
    """Change the database, and say what it is now."""
    from retro.cli.stages import describe
    from retro.device import pick_device

    data_path = data_path_of(options)
    manifest = change(options.documents, data_path, device=pick_device(options.device))
    names = list(manifest["removed"].values())
    removed = ", ".join(names[:N_NAMED]) or "none"
    removed += f" and {len(names) - N_NAMED:,} more" if len(names) > N_NAMED else ""
    note(f"database: {describe(manifest)}; {sum(manifest['additions'])} documents added since, removed: {removed}")
    note(f"next: retro dataset --data-path {data_path}, before another model is trained on it")
