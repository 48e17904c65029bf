"""Models trained from nothing, with retrieval and without it, on each corpus.

The same decoder is trained with and without retrieval on the same samples in the same order, for the same number of
steps and, without retrieval, for as many steps as take the same time, with each seed. All are evaluated on whole
documents that neither the training nor the database has seen.

The recipe was chosen on the held-out modeling files, with one seed, for what retrieval saves at equal steps (`LEVERS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import about, begin, call, evaluated, time_ratios
from corpora import Source

CHUNK_LEN, CHUNKS_PER_SAMPLE = 16, 16
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
    doublings: int = 0  # of the steps, with the first seed, to see where each kind of model flattens


def prepare(source: Source, valid_fraction: float) -> None:
    """Database and dataset of the texts in the current folder."""
    words = ["--valid-fraction", str(valid_fraction), "--hold-out", source.hold_out]
    search = ["--chunk-len", str(CHUNK_LEN), "--retriever", "bm25", "--rerank", "50"]
    call("database", "texts", "--tokenizer", "bpe:2048", *words, *search)
    call("dataset", "--chunks-per-sample", str(CHUNKS_PER_SAMPLE), "--skip-range", "1")


def config(steps: int, seed: int) -> Any:
    """How all models are trained; only the steps and the seed differ."""
    from retro.device import has_bf16, pick_device
    from retro.train import TrainConfig

    return TrainConfig(
        batch_size=8,
        steps=steps,
        lr=4e-3,
        optimizer="muon",
        schedule="cosine",
        warmup=min(100, -(-steps // 10)),
        clip=1.0,
        precision="bf16" if has_bf16(pick_device("cpu")) else "fp32",
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


def trained(name: str, kind: str, steps: int, seed: int) -> tuple[Path, dict[str, Any]]:
    """The run of a model of some kind, and its summary."""
    from retro.train import train

    print(f"\n# {name}, seed {seed}: {steps:,} steps", flush=True)
    return train(name=name, config=config(steps, seed), model_shape=SHAPES[kind], device="cpu", prompt="The ")


def measure(place: Path, source: Source, size: Size) -> dict[str, Any]:
    """Everything for one corpus, in a folder below `place`."""
    from retro.evaluation.result import joined

    share = source.share_from_nothing or source.share
    valid_fraction = source.valid_from_nothing or source.valid_fraction
    begin(place, source, share, valid_fraction)
    prepare(source, valid_fraction)
    kinds = {kind: partial(new_model, kind) for kind in SHAPES}
    ratio = 1 / time_ratios(kinds, config(1000, 0), n_steps=10, n_rounds=8)["plain"]
    plans = {
        "retro": ("retro", size.steps),
        "equal-steps": ("plain", size.steps),
        "equal-time": ("plain", round(size.steps * ratio)),
    }
    runs = [{name: trained(name, *plan, seed) for name, plan in plans.items()} for seed in size.seeds]
    options = {"window": WINDOW, "stride": STRIDE, "n_windows": size.n_windows, "n_shuffles": 1}

    def compared(name: str, others: tuple[str, ...] = ()) -> dict[str, Any]:
        return joined([
            evaluated(f"{name}-{seed}", of["retro"][0], baseline=of[name][0], others=others, **options)
            for seed, of in zip(size.seeds, runs, strict=True)
        ])  # fmt: skip

    lengths = [size.steps << n for n in range(size.doublings + 1)] if size.doublings else []
    longer = {kind: [trained(kind, kind, steps, size.seeds[0])[0] for steps in lengths] for kind in SHAPES}
    pairs = zip(lengths, longer["retro"], longer["plain"], strict=True)
    return about(source, share, Path("data")) | {
        "longer": {n: evaluated(f"{n}-steps", on, baseline=plain, others=(), **options) for n, on, plain in pairs},
        "time_ratio": ratio,
        "runs": {name: [of_seed[name][1] for of_seed in runs] for name in plans},
        "evaluations": {
            "equal-steps": compared("equal-steps", ("off", "random")),
            "equal-time": compared("equal-time"),
        },
    }
