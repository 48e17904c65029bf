"""`retro database` and `retro dataset`: from texts to samples with neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from retro.cli.options import add_config, config_from, data_path_of, new_parser, parse_with_preset, the_other_of
from retro.config import OF_OWN_TEXT, CorpusConfig, DatabaseConfig, DatasetConfig, Preset
from retro.errors import MissingArtifact
from retro.progress import note

TEXTS = "text files, files of many texts (JSON lines, Parquet, datasets), or folders of them"


def database_config(options: Namespace, given: set[str], named: set[str]) -> DatabaseConfig:
    """The database's config, in which what was given goes before what a preset has in its place."""
    changed: dict[str, Any] = {}
    if the_other_of(("n_probe", "recall"), given, named) == "n_probe":
        changed["n_probe"] = None
    if given & {"n_centeroids", "code_size"} and "index" not in given:
        changed["index"] = None
    return config_from(DatabaseConfig, options, changed)


def database_command(argv: Sequence[str]) -> None:
    """Texts to corpus and database."""

    def build(preset: Preset) -> ArgumentParser:
        parser = new_parser(
            "database", "Build the key-value database of a text: BERT embeddings in a FAISS index.", texts=TEXTS
        )
        add_config(parser, CorpusConfig, preset.corpus)
        add_config(parser, DatabaseConfig, preset.database, skip=("seed",))
        return parser

    options, given, named = parse_with_preset(build, argv)
    config, corpus_config = database_config(options, given, named), config_from(CorpusConfig, options)
    from retro.cli.stages import prepare_corpus, prepare_database
    from retro.device import pick_device
    from retro.text.corpus import CORPUS_FOLDER, MANIFEST_FILE, Corpus

    device, data_path = pick_device(options.device), data_path_of(options)
    folder = data_path / CORPUS_FOLDER
    if not options.texts and options.preset not in OF_OWN_TEXT:
        if not (folder / MANIFEST_FILE).exists():
            raise MissingArtifact(
                folder, f"a TEXT is missing, and {folder} does not exist (for a first look at plays: --preset demo)"
            )
        corpus = Corpus.load(folder)  # another index over the text that is there
    else:
        corpus = prepare_corpus(corpus_config, options.preset or "demo", options.texts, data_path, rebuild=True)
    prepare_database(config, corpus, data_path, device, rebuild=True)
    if corpus.split("valid"):
        note(f"next: retro dataset --data-path {data_path}")
    else:  # nothing to validate on: a database for models that are trained already
        note(f"next: retro evaluate --run RUN TEXT ... --database {data_path}")


def dataset_command(argv: Sequence[str]) -> None:
    """The database's text to samples with neighbors."""

    def build(preset: Preset) -> ArgumentParser:
        parser = new_parser("dataset", "Retrieve the neighbors of every training and validation sample, once.")
        add_config(parser, DatasetConfig, preset.dataset)
        return parser

    options, _, _ = parse_with_preset(build, argv)
    config, data_path = config_from(DatasetConfig, options), data_path_of(options)
    from retro.cli.stages import prepare_dataset
    from retro.device import pick_device
    from retro.search.index_file import read_database_manifest
    from retro.text.corpus import open_corpus

    corpus, manifest = open_corpus(data_path), read_database_manifest(data_path)
    prepare_dataset(config, corpus, manifest, data_path, pick_device(options.device), rebuild=True)
    note(f"next: retro train --data-path {data_path}")
