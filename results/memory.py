"""A pretrained base with a memory, and what else could be done with it: SmolLM2-135M on each corpus.

The same frozen base learns to read what a database of the corpus' training documents has (RETROfit), or is fine-tuned
on the same samples in the same order without retrieval, for as many steps as take the same time; with each seed. All
are evaluated on the same windows of held-out documents, from the middles of as many parts of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    LEXICAL,
    RERANKED,
    Database,
    Measured,
    Training,
    about,
    call,
    costs,
    database_of,
    evaluated,
    time_ratios,
    without_held_out,
)
from corpora import SOURCES, Source, drawn, fitting

from retro.config import PACKAGED_BASE, DatasetConfig

BASE = PACKAGED_BASE
CHUNK_LEN, CHUNKS_PER_SAMPLE = 64, 16
WINDOW, STRIDE = 1024, 768
# Databases of some of the documents, how these are chosen, and their share: of the text, and of the documents.
SMALLER = {"a hundredth": (fitting, 0.01), "a tenth": (drawn, 0.1)}
OTHER_TEXTS = (*SMALLER, "ten times", "python", "plays", "right removed")
BY_SEARCH = {
    "bert": ["--retriever", "bert", "--index", "Flat"],
    "bert reranked": ["--retriever", "bert", "--index", "Flat", *RERANKED],
    "bert compressed": ["--retriever", "bert", "--index", "IVF64,PQ64"],
    "hybrid reranked": ["--retriever", "hybrid", "--index", "Flat", *RERANKED],
    "bm25": ["--retriever", "bm25"],
}
NEIGHBORS = (1, 2, 4, 8)
ON_TOP: dict[str, Any] = {"others": ("off",), "against": ("in-context",)}  # what else is measured, where that is asked
LONGER = 4
# What learns, beside a base that reads. How else it can be made used to a text: the learning rates were chosen for them
# after 40 steps on the held-out modeling files themselves: LoRA 0.603, 0.561, 0.569 at 1e-3, 3e-3, 1e-2; all weights,
# which take a hundredth of it, 0.607, 0.554, 0.529, 0.592 at 3e-3, 1e-2, 3e-2, 1e-1.
KINDS: dict[str, dict[str, Any]] = {
    "memory": {},
    "lora": {"ca_layers": (), "trains": "lora"},
    "all": {"ca_layers": (), "trains": "all"},
    "both": {"trains": "lora"},
}
RATES = {"lora": 3e-3, "all": 3e-2, "both": 3e-3}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    seeds: tuple[int, ...]
    n_windows: int  # the most of each held-out document
    tuned: tuple[str, ...] = ("lora",)
    rivals: tuple[str, ...] = ("in-context",)
    both: tuple[int, ...] = (0,)  # seeds with which it also learns to read while LoRA learns
    costs: tuple[str, ...] = ()  # ways whose generated token is timed
    n_timed: int = 12  # rounds in which the steps of all kinds are timed
    searches: bool = False  # the database is searched in other ways
    sweeps: bool = False  # other databases, and other numbers of neighbors
    longer: bool = False  # the first way to fine-tune also learns for `LONGER` times as long, with the first seed

    def rounds(self) -> tuple[Size, ...]:
        """What is measured first, second and at last, each with what came before."""
        alone = replace(self, searches=False, sweeps=False, longer=False)
        return replace(alone, seeds=self.seeds[:1], both=self.both[:1]), alone, self


def build(*words: str) -> None:
    """A database of chunks as long as the models read."""
    call("database", *words, "--chunk-len", str(CHUNK_LEN))


def prepare(source: Source) -> None:
    """Database and dataset of the texts in the current folder."""
    words = ["--valid-fraction", str(source.valid_fraction), "--hold-out", source.hold_out]
    build("texts", "--tokenizer", BASE, *words, *LEXICAL)
    call("dataset", "--chunks-per-sample", str(CHUNKS_PER_SAMPLE), "--skip-range", "1")


def config(steps: int, seed: int, **given: Any) -> Any:
    """How all are trained, as the preset retrofit is; only steps, seed and learning rate differ."""
    from retro.config import PRESETS

    warmup = max(1, steps // 6)
    measured_once = {"interval": steps, "n_valid_batches": 1, "n_final_batches": 1}
    return replace(PRESETS["retrofit"].train, steps=steps, seed=seed, warmup=warmup, **measured_once, **given)


def shape(kind: str) -> dict[str, Any]:
    """The shape of a model of some kind: `memory` reads neighbors, `both` too while LoRA learns, others do not."""
    return {"base": BASE} | KINDS[kind]


def new_model(kind: str) -> Any:
    """A model of some kind that has not been trained."""
    from retro.config import RetrofitConfig
    from retro.runs import models

    return models.new_model(RetrofitConfig(chunk_len=CHUNK_LEN, **shape(kind)))


def training(measured: Measured, name: str, kind: str, steps: int, seed: int) -> Training:
    """The training of a model of some kind."""
    given = {"lr": RATES[kind]} if kind in RATES else {}
    return Training(measured, name, shape(kind), config(steps, seed, **given))


def database_of_texts(source: Source, name: str) -> Path:
    """The data folder of a database of other texts."""
    from retro.text.corpus import Corpus

    corpus, texts = Corpus.load("data/corpus"), dict(source.read())
    train = [(corpus.documents[i].name, texts[corpus.documents[i].name]) for i in corpus.split("train")]
    if name in SMALLER:
        choose, share = SMALLER[name]
        some = choose(train, share)
    elif name in SOURCES:
        some = drawn(SOURCES[name].read(), SOURCES[name].share)
    elif name == "ten times":
        some = without_held_out(corpus, source.read())
    else:
        right = right_documents(corpus)
        some = [(name, text) for name, text in train if name not in right]
    return database_of(some, name, *LEXICAL, "--chunk-len", str(CHUNK_LEN))


def database_by_search(name: str) -> Path:
    """The data folder of a database of the same text that is searched in another way."""
    folder, keys = Path(f"database-{name.replace(' ', '-')}"), Path("database-bert/keys")
    if not folder.exists():  # what is embedded, is embedded once
        part = folder.with_name(f"{folder.name}.part")
        shutil.copytree("data/corpus", part / "corpus", dirs_exist_ok=True)
        if keys.exists():
            shutil.copytree(keys, part / "keys", dirs_exist_ok=True)
        part.rename(folder)
    build("--data-path", str(folder), *BY_SEARCH[name])
    return folder


def right_documents(corpus: Any) -> set[str]:
    """For each held-out document, the one from which most of its chunks get their nearest neighbor."""
    from retro.database import RetroIndex
    from retro.evaluation.leakage import retrieve
    from retro.evaluation.windows import chunk_offsets

    offsets = chunk_offsets(corpus, CHUNK_LEN)
    nearest = retrieve(corpus, RetroIndex(data_path="data"), offsets, 1)[0][:, 0]
    of, found = corpus.document_of(offsets), corpus.document_of(nearest.clip(min=0))
    numbers = {int(np.bincount(found[(of == i) & (nearest >= 0)]).argmax()) for i in corpus.split("valid")}
    return {corpus.documents[i].name for i in numbers}


def sweeps(
    measured: Measured, source: Source, first: Training, size: Size, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Evaluations with a database that is searched in other ways, with others, and with other numbers of neighbors."""
    databases: dict[str, Database] = {}
    if size.sweeps:
        whole = {name: SOURCES[name].share if name in SOURCES else 1.0 for name in OTHER_TEXTS}
        share = whole | {name: of for name, (_, of) in SMALLER.items()}
        databases |= {
            name: Database([name, of, LEXICAL], partial(database_of_texts, source, name)) for name, of in share.items()
        }
    if size.searches:
        databases |= {n: Database([n, words], partial(database_by_search, n)) for n, words in BY_SEARCH.items()}

    def of(name: str, others: Sequence[str] = (), **given: Any) -> dict[str, Any]:
        return evaluated(measured, name, first, others=others, **given, **options)

    found = {
        f"database {name}": of(f"database {name}", database=database, **(ON_TOP if name == "ten times" else {}))
        for name, database in databases.items()
    }
    numbers = NEIGHBORS if size.sweeps else (DatasetConfig.n_neighbors,) if size.searches else ()
    return found | {f"neighbors {k}": of(f"neighbors {k}", n_neighbors=k) for k in numbers}


def measure(folder: Path, place: Path, source: Source, size: Size) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything for one corpus, from figures that are kept in `folder`, and the machines that they are of.

    Databases and runs are below `place`.
    """
    from retro.evaluation.result import joined

    texts, how = drawn(source.read(), source.share, source.hold_out), [source.valid_fraction, CHUNK_LEN, LEXICAL]
    measured = Measured(folder, place, texts, how, partial(prepare, source))
    every = {kind: partial(new_model, kind) for kind in KINDS}
    timed = time_ratios(measured, every, config(100, 0), n_steps=1, n_rounds=size.n_timed, of_any_text=True)
    kinds = ("memory", *size.tuned, *(["both"] if size.both else []))
    ratios = {kind: timed["ratios"][kind] for kind in kinds}
    about_it = measured.figure("about", None, lambda: about(source, source.share, Path("data")))
    runs = {
        name: [
            training(measured, name, name, max(2, round(size.steps / ratios[name])), seed)
            for seed in (size.both if name == "both" else size.seeds)
        ]
        for name in ratios
    }  # fmt: skip
    first, first_tuned = runs["memory"][0], runs[size.tuned[0]][0]
    options = {"window": WINDOW, "stride": STRIDE, "n_windows": size.n_windows, "n_shuffles": 1}
    found: dict[str, Any] = {}
    # Rivals of the frozen base need no training, so they are the same for all seeds.
    found["rivals"] = evaluated(measured, "rivals", first, others=("off",), against=size.rivals, **options)
    cost = costs(measured, first, size.costs, WINDOW, DatasetConfig.n_neighbors) if size.costs else {}
    if size.costs and size.sweeps:
        cost["on, most neighbors"] = costs(measured, first, ["on"], WINDOW, NEIGHBORS[-1])["on"]
    for name in size.tuned:
        others = ("off", "random") if name == size.tuned[0] else ()
        found[name] = joined([
            evaluated(measured, f"{name} {seed}", on, baseline=tuned, others=others, **options)
            for seed, on, tuned in zip(size.seeds, runs["memory"], runs[name], strict=True)
        ])  # fmt: skip
    if size.both:
        found["both"] = joined([
            evaluated(measured, f"both {seed}", on, baseline=tuned, others=("random",), **options)
            for seed, on, tuned in zip(size.both, runs["both"], runs["lora"], strict=False)
        ])  # fmt: skip
    summaries = {name: [made.summary() for made in of_seeds] for name, of_seeds in runs.items()}
    if size.sweeps:
        found["tuned, in-context"] = evaluated(
            measured, "tuned in-context", first, baseline=first_tuned, **ON_TOP, **options
        )
        found["both, most neighbors"] = evaluated(
            measured, "both 0 most neighbors", runs["both"][0], others=(), n_neighbors=NEIGHBORS[-1], **options
        )
        found["together"] = evaluated(measured, "together", first, others=("off",), against=("both",), **options)
    found |= sweeps(measured, source, first, size, options)
    if size.longer:
        longer = training(measured, "longer", size.tuned[0], LONGER * first_tuned.config.steps, size.seeds[0])
        summaries["longer"] = [longer.summary()]
        found["longer"] = evaluated(measured, "longer", first, baseline=longer, others=(), **options)
    of_it = {"ratios": ratios, "timed": timed, "runs": summaries, "evaluations": found, "costs": cost}
    return about_it | of_it | {"processor_seconds": measured.seconds, "bases": measured.bases}, measured.machines
