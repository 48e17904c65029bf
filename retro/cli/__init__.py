"""The command lines: `retro COMMAND`, and `python -m retro.STAGE`, which is the same.

Everything heavy is imported after the options are read, so that `retro COMMAND --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from retro import parallel
from retro.cli.repair import explain

# Each command: where its function is, and what it does.
COMMANDS = {
    "database": ("building", "texts to a database: BERT embeddings in a FAISS index"),
    "dataset": ("building", "the neighbors of every training sample, retrieved once"),
    "train": ("training", "train a model that reads them; of texts, builds them before"),
    "sample": ("using", "write text with a trained model that retrieves as it writes"),
    "explore": ("exploring", "the same in a browser, its sources beside it; and the database"),
    "evaluate": ("using", "what retrieval brings to text that nobody trained on"),
    "runs": ("listing", "the runs there are, with their figures"),
    "add": ("changing", "add documents to a database, embedding only them"),
    "remove": ("changing", "take documents out of a database"),
    "verify": ("verifying", "whether all that was written is as it was written, to the last byte"),
    "plan": ("planning", "what a database of any size will take, told before it is built"),
}
ENDED_BY_SIGPIPE = 141  # as shells report of other programs whose reader went
OVERVIEW = """usage: retro COMMAND [OPTIONS]      retro COMMAND --help shows all options

From text to a sample:

  retro train --preset demo                               a first look, on plays

  retro database ~/notes papers.jsonl --data-path mydata  your own text
  retro dataset --data-path mydata
  retro train --data-path mydata --steps 2000
  retro sample --data-path mydata "Dear reader,"          or none: it asks

Commands:

"""


def main(argv: Sequence[str] | None = None) -> int:
    """`retro`: run a command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name or a sample that the terminal cannot show ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_what_nobody_reads()
        return ENDED_BY_SIGPIPE


def _drop_what_nobody_reads() -> bool:
    """Send standard output and error nowhere, if their reader has gone, as `head` does; whether one has."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW + "\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
        return 0
    if arguments[0] == "--version":
        from retro import __version__

        print(f"retro {__version__}")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"error: there is no command {name!r}{f'; is it {near[0]!r}?' if near else ''}", file=sys.stderr)
        print(f"commands: {', '.join(COMMANDS)}; retro --help says what they do", file=sys.stderr)
        return 2
    return _run(name, options)


def script(name: str) -> None:
    """What the script of a stage does: its command, with the options of the process."""
    raise SystemExit(main([name, *sys.argv[1:]]))


def _without_old_flags(name: str, options: list[str]) -> tuple[str, list[str]]:
    """`database --add TEXT` and the like, which are commands of their own, as these commands."""
    for command in ("add", "remove", "plan"):
        if name == "database" and (flag := f"--{command}") in options:
            if command != "plan" and not options[0].startswith("-"):
                raise ValueError(f"{options[0]}: texts to build a database of, but --add and --remove change one")
            return command, [option for option in options if option != flag]
    return name, options


def _run(name: str, options: list[str]) -> int:
    """Run a command; what users can cause becomes a message and an exit status, without a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # on all cores; said, so that it warns of no fork
    if parallel.rank():  # rank 0 speaks for all
        os.environ["TQDM_DISABLE"] = "1"
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    try:
        name, options = _without_old_flags(name, options)
        getattr(importlib.import_module(f"retro.cli.{COMMANDS[name][0]}"), f"{name}_command")(options)
    except (ValueError, OSError) as error:
        # What was written meanwhile may have been named as what could not be written.
        if isinstance(error.__cause__ or error, BrokenPipeError) and _drop_what_nobody_reads():
            return ENDED_BY_SIGPIPE
        if sys.flags.dev_mode:  # python -X dev shows where
            raise
        print(f"\nerror: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0
