"""Models trained from nothing, with retrieval and without it, on each corpus.

The same decoder is trained with and without retrieval on the same samples in the same order, for the same number of
steps and, without retrieval, for as many steps as take the same time, with each seed. All are evaluated on whole
documents that neither the training nor the database has seen.

The recipe was chosen on the held-out modeling files, with one seed, for what retrieval saves at equal steps (`LEVERS`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    LEXICAL,
    Database,
    Measured,
    Training,
    about,
    call,
    database_of,
    evaluated,
    time_ratios,
    without_held_out,
)
from corpora import Source, Texts, drawn

CHUNK_LEN, CHUNKS_PER_SAMPLE, BATCH_SIZE = 16, 16, 8
FEW, VALID_OF_FEW, DOUBLINGS_OF_FEW = 0.05, 0.3, 3  # share of a corpus, what of it is held out, doublings of the steps
WINDOW, STRIDE = CHUNK_LEN * CHUNKS_PER_SAMPLE, CHUNK_LEN * 12  # tokens of an evaluation's windows, and between them
SHAPE: dict[str, Any] = {
    "d_model": 128,
    "n_layers": 4,
    "ca_layers": (1, 2, 3),
    "n_heads": 4,
    "d_k": 32,
    "d_ff": 512,
    "n_encoder_layers": 1,
    "encoder_ca_layers": (),
    "relative_positions": True,
}
# Bits per byte without retrieval and with it, after so many steps; in 40 windows of each held-out document.
LEVERS = (
    ("Adam, chunks of 32, encoder reads the chunk", 900, 0.597, 0.573),
    ("Muon for matrices in place of Adam", 900, 0.559, 0.534),
    ("Muon, two encoder layers, neither reads the chunk", 900, 0.559, 0.532),
    ("these, with relative positions", 900, 0.559, 0.520),
    ("these, twice the steps (on a GPU)", 1800, 0.483, 0.446),
    ("these by Adam (on a GPU)", 1800, 0.521, 0.471),
    ("these by Muon, every layer reads (on a GPU)", 1800, 0.483, 0.453),
    ("one encoder layer (on a GPU)", 1800, 0.483, 0.463),
    ("one encoder layer, one layer reads (on a GPU)", 1800, 0.483, 0.458),
    ("the same, encoder half as wide (on a GPU)", 1800, 0.483, 0.463),
    ("twice the width and six layers, two of the encoder (on a GPU)", 1200, 0.442, 0.421),
    ("one encoder layer, chunks of 16, by Adam", 900, 0.609, 0.540),
    ("the same, one layer reads", 900, 0.609, 0.552),
    ("one encoder layer, chunks of 16, by Muon", 900, 0.567, 0.513),
    ("the same, twice the steps (on a GPU): the recipe", 1800, 0.492, 0.431),
)
SHAPES = {"retro": SHAPE, "plain": SHAPE | {"ca_layers": ()}}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    seeds: tuple[int, ...]  # of the weights and of the order of the samples
    n_windows: int | None = None  # the most of each held-out document
    doublings: int = 0  # of the steps, with the first seed
    few: int = 0  # steps on a share of the text that is so small that both kinds of model flatten, with the first seed

    def rounds(self) -> tuple[Size, ...]:
        """What is measured first, second and at last, each with what came before."""
        alone = replace(self, doublings=0, few=0)
        return replace(alone, seeds=self.seeds[:1]), alone, self


def prepare(source: Source, valid_fraction: float) -> None:
    """Database and dataset of the texts in the current folder."""
    words = ["--valid-fraction", str(valid_fraction), "--hold-out", source.hold_out]
    call("database", "texts", "--tokenizer", "bpe:2048", *words, "--chunk-len", str(CHUNK_LEN), *LEXICAL)
    call("dataset", "--chunks-per-sample", str(CHUNKS_PER_SAMPLE), "--skip-range", "1")


def config(steps: int, seed: int) -> Any:
    """How all models are trained; only the steps and the seed differ."""
    from retro.train import TrainConfig

    return TrainConfig(
        batch_size=BATCH_SIZE,
        steps=steps,
        lr=4e-3,
        optimizer="muon",
        schedule="cosine",
        warmup=min(100, -(-steps // 10)),
        clip=1.0,
        interval=min(500, steps),
        n_valid_batches=8,
        n_final_batches=8,
        seed=seed,
    )


def new_model(kind: str) -> Any:
    """A model of some kind that has not been trained."""
    from retro.model import RetroConfig, RetroModel
    from retro.text.corpus import Corpus

    n_vocab = Corpus.load("data/corpus").n_tokens
    return RetroModel.from_config(RetroConfig(n_vocab=n_vocab, chunk_len=CHUNK_LEN, **SHAPES[kind]))


def measure(folder: Path, place: Path, source: Source, size: Size) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything for one corpus, from figures that are kept in `folder`, and the machines that they are of.

    Databases and runs are below `place`.
    """
    from retro.evaluation.result import joined

    share = source.share_from_nothing or source.share
    valid_fraction = source.valid_from_nothing or source.valid_fraction
    texts = drawn(source.read(), share, source.hold_out)
    measured = Measured(folder, place, texts, [valid_fraction, CHUNK_LEN], partial(prepare, source, valid_fraction))
    kinds = {kind: partial(new_model, kind) for kind in SHAPES}
    timed = time_ratios(measured, kinds, config(1000, 0), n_steps=10, n_rounds=8)
    ratio = 1 / timed["ratios"]["plain"]
    about_it = measured.figure("about", None, lambda: about(source, share, Path("data")))

    def training(kind: str, steps: int, seed: int) -> Training:
        return Training(measured, kind, SHAPES[kind], config(steps, seed), prompt="The ")

    plans = {
        "retro": ("retro", size.steps),
        "equal-steps": ("plain", size.steps),
        "equal-time": ("plain", round(size.steps * ratio)),
    }
    runs = {name: [training(*plan, seed) for seed in size.seeds] for name, plan in plans.items()}
    options = {"window": WINDOW, "stride": STRIDE, "n_windows": size.n_windows, "n_shuffles": 1}

    def compared(name: str, others: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        return [
            evaluated(measured, f"{name} {seed}", on, baseline=plain, others=others, **options)
            for seed, on, plain in zip(size.seeds, runs["retro"], runs[name], strict=True)
        ]

    of_seeds = {"equal-steps": compared("equal-steps", ("off", "random")), "equal-time": compared("equal-time")}
    found = {name: joined(evaluations) for name, evaluations in of_seeds.items()}
    summaries = {name: [made.summary() for made in made_of] for name, made_of in runs.items()}
    longer = {size.steps: of_seeds["equal-steps"][0]} if size.doublings else {}
    for steps in [size.steps << n for n in range(1, size.doublings + 1)]:
        on, plain = (training(kind, steps, size.seeds[0]) for kind in SHAPES)
        longer[steps] = evaluated(measured, f"{steps} steps", on, baseline=plain, others=(), **options)
    few, machines, seconds = until_flat(folder, place, source, size, options) if size.few else ({}, [], {})
    of_it = {"longer": longer, "few": few, "time_ratio": ratio, "timed": timed, "runs": summaries, "evaluations": found}
    return about_it | of_it | {"processor_seconds": measured.seconds | seconds}, [*measured.machines, *machines]


def until_flat(
    folder: Path, place: Path, source: Source, size: Size, options: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, float | None]]:
    """Both kinds of model after ever more steps on little text, the machines, and what each figure took.

    What reads is evaluated with the little that it was trained with, and with all other texts of the corpus.
    """
    texts = source.read()
    little = drawn(texts, FEW, source.hold_out)
    measured = Measured(folder, place, little, [VALID_OF_FEW, CHUNK_LEN], partial(prepare, source, VALID_OF_FEW))
    found: dict[str, Any] = measured.figure("about few", None, lambda: about(source, FEW, Path("data")))
    of_all = Database(["all others", LEXICAL], partial(database_of_others, texts))
    found["longer"], found["of all"] = {}, {}
    for steps in [size.few << n for n in range(DOUBLINGS_OF_FEW + 1)]:
        on, plain = (
            Training(measured, kind, SHAPES[kind], config(steps, size.seeds[0]), prompt="The ") for kind in SHAPES
        )
        name = f"few {steps} steps"
        found["longer"][steps] = evaluated(measured, name, on, baseline=plain, others=(), **options)
        found["of all"][steps] = evaluated(measured, f"{name} of all", on, database=of_all, others=(), **options)
    return found, measured.machines, measured.seconds


def database_of_others(texts: Texts) -> Path:
    """The data folder of a database of all texts that are not held out of the one in the current folder."""
    from retro.text.corpus import Corpus

    some = without_held_out(Corpus.load("data/corpus"), texts)
    return database_of(some, "all others", "--chunk-len", str(CHUNK_LEN), *LEXICAL)
