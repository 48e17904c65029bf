"""`retro add` and `retro remove`: documents come to a database and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retro.cli.options import data_path_of, new_parser
from retro.progress import note


def add_command(argv: Sequence[str]) -> None:
    """Add documents to a database."""
    parser = new_parser("add", "Add documents to a database, embedding only them.")
    parser.add_argument("texts", metavar="TEXT", nargs="+", type=str, help="files to add, or folders of them")
    options = parser.parse_args(list(argv))
    from retro.device import pick_device
    from retro.search.updates import add_documents

    data_path = data_path_of(options)
    _report(add_documents(options.texts, data_path, device=pick_device(options.device)), data_path)


def remove_command(argv: Sequence[str]) -> None:
    """Take documents out of a database."""
    parser = new_parser("remove", "Take documents out of a database.")
    parser.add_argument("names", metavar="NAME", nargs="+", type=str, help="names of documents")
    options = parser.parse_args(list(argv))
    from retro.device import pick_device
    from retro.search.updates import remove_documents

    data_path = data_path_of(options)
    _report(remove_documents(options.names, data_path, device=pick_device(options.device)), data_path)


def _report(manifest: dict[str, Any], data_path: Any) -> None:
    from retro.cli.stages import describe

    removed = ", ".join(manifest["removed"].values()) or "none"
    note(f"database: {describe(manifest)}; {sum(manifest['additions'])} documents added since, removed: {removed}")
    note(f"next: retro dataset --data-path {data_path}, before another model is trained on it")
