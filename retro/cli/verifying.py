"""`retro verify`: is everything as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import cast

from jsonargparse import ArgumentParser

from retro.cli.options import DATA
from retro.cli.repair import explain
from retro.config import LEXICAL, retriever_parts
from retro.errors import ArtifactError, MissingArtifact
from retro.progress import note

Part = tuple[str, Callable[[], object]]  # what it is, and what raises where it is not as it was written


def verify_command(argv: Sequence[str]) -> None:
    """Read all of a data folder, and of the runs on it, and compare it with the hashes that were written with it."""
    description = "Read a data folder and the runs on it whole, and compare everything with its hashes."
    parser = ArgumentParser(prog="retro verify", description=description)
    parser.add_argument("--data-path", metavar="DIR", type=str, default=DATA, help="folder of the data")
    data_path = Path(parser.parse_args(list(argv)).data_path)
    from retro.storage.known import reading_all

    damaged, n_parts = 0, 0
    with reading_all():
        for what, look in [*_parts_of_data(data_path), *_parts_of_runs(data_path)]:
            n_parts += 1
            try:
                look()
                note(f"{what}: as it was written")
            except (ArtifactError, OSError) as error:
                damaged += 1
                note(f"{what}: {explain(error)}")
    if not n_parts:
        raise MissingArtifact(data_path, f"there is nothing in {data_path} to look at")
    if damaged:
        raise ValueError(
            f"{damaged} of {n_parts} {'is' if damaged == 1 else 'are'} not as written; what to do is above"
        )


def _parts_of_data(data_path: Path) -> Iterator[Part]:
    """Corpus, database and samples, those that are there."""
    from retro.dataset import DATASET_FILE, Dataset
    from retro.search.bm25 import BM25
    from retro.search.building import files_beside, open_manifest
    from retro.search.index_file import MANIFEST_FILE as DATABASE_MANIFEST
    from retro.search.index_file import files_of
    from retro.search.keys import Keys
    from retro.text.corpus import CORPUS_FOLDER, MANIFEST_FILE, Corpus

    folder = data_path / CORPUS_FOLDER
    corpus_of = cache(Corpus.load)  # which all parts have, and one reads
    if (folder / MANIFEST_FILE).exists():
        yield f"corpus in {folder}", lambda: corpus_of(folder).require_own_name()
    if (data_path / DATABASE_MANIFEST).exists():

        def database() -> None:
            corpus = corpus_of(folder)
            manifest = open_manifest(data_path, corpus)
            embeds, other = retriever_parts(manifest["retriever"])
            if embeds:
                files_of(data_path, manifest)
                Keys(data_path, corpus, manifest["chunk_len"], manifest).is_whole()
            if other == LEXICAL and (files := files_beside(data_path, corpus, manifest)):
                cast(BM25, files.open()).is_whole()

        yield f"database in {data_path}", database
    for file in (data_path / name for name in DATASET_FILE.values()):
        if file.exists():
            yield f"samples in {file}", lambda file=file: Dataset(file, corpus_of(folder))  # type: ignore[misc]


def _parts_of_runs(data_path: Path) -> Iterator[Part]:
    """The checkpoints of the runs below `logs/` that were made with these data."""
    from retro.runs.checkpoints import checkpoints_of, verify_checkpoint
    from retro.runs.run import LOGS, read_run, runs_below

    for run in runs_below(LOGS):
        try:
            if Path(read_run(run)["data_path"]).resolve() != data_path.resolve():
                continue
        except ArtifactError as error:
            yield f"run in {run}", lambda error=error: _raise(error)  # type: ignore[misc]
            continue
        for checkpoint in checkpoints_of(run):
            yield f"checkpoint {checkpoint}", lambda checkpoint=checkpoint: verify_checkpoint(checkpoint)  # type: ignore[misc]


def _raise(error: Exception) -> None:
    raise error
