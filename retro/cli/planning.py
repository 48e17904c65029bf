"""`retro plan`: what a database will take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from retro.cli.building import TEXTS, database_config
from retro.cli.options import add_config, config_from, data_path_of, new_parser, parse_with_preset
from retro.cli.presets import texts_of
from retro.config import LEXICAL, CorpusConfig, DatabaseConfig, Preset
from retro.errors import InvalidOption
from retro.progress import note


def plan_command(argv: Sequence[str]) -> None:
    """Bytes, memory and time of a database of any size."""

    def build(preset: Preset) -> ArgumentParser:
        parser = new_parser(
            "plan", "Say what a database of N tokens of such text would take; build nothing.", texts=TEXTS
        )
        parser.add_argument("--n-tokens", type=float, default=None, metavar="N", help="size to plan for, as 1e9")
        parser.add_argument("--n-processes", type=int, default=1, metavar="N", help="processes to plan for")
        add_config(parser, CorpusConfig, preset.corpus)
        add_config(parser, DatabaseConfig, preset.database, skip=("seed",))
        return parser

    options, given, named = parse_with_preset(build, argv)
    if options.n_tokens is None:
        raise InvalidOption("n_tokens", None, "is no size; name one: retro plan --n-tokens 1e9 [TEXT ...]")
    corpus, database = config_from(CorpusConfig, options), database_config(options, given, named)
    if database.parts[1] not in (None, LEXICAL):
        raise InvalidOption("retriever", database.retriever, "is not planned, since retro did not make it")
    from retro.device import pick_device
    from retro.planning.plan import check_size, describe, plan
    from retro.planning.rates import measure
    from retro.text.records import Columns

    device = pick_device(options.device)
    check_size(options.n_tokens, options.n_processes)
    preset = options.preset or "demo"
    texts = [Path(text) for text in options.texts] or texts_of(preset, data_path_of(options))
    sample = f"{texts[0]}{' and others' if len(texts) > 1 else ''}"
    note(f"measuring this machine on a sample of {sample}")
    if not options.texts:
        note(f"no TEXT is named, so this is for text like that of --preset {preset}; name your own to plan for it")
    rates = measure(
        texts,
        corpus.tokenizer,
        database.chunk_len,
        database.embedder,
        device,
        database.factory,
        corpus.valid_fraction,
        Columns(corpus.text_column, corpus.name_column),
        database.retriever,
    )
    of_database = database.factory, options.n_processes, database.n_train, database.key_bits
    note(describe(plan(options.n_tokens, rates, *of_database)))
