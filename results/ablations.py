"""What each part of the paper's model is worth, at equal steps: `make ablations [QUICK=1]`.

The recipe of the preset paper-tiny at a size that one core trains in minutes, on code that repeats itself: a share of
the modeling files of the installed transformers. Each variant differs from it in one thing and is trained with the same
seeds on the same samples in the same order, then measured on the same held-out documents. Variants are trained two at
a time, each in a process with one thread. Whatever is finished is kept under `results/cache/` and found again. Writes
`ABLATIONS.md`, `ablations.json` and `ablations.png` beside this file (under `results/cache/quick/` for QUICK=1).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, call, machine, write_json

from retro.storage.manifests import sha256_of_json

CHUNK_LEN, CHUNKS_PER_SAMPLE, WINDOW, STRIDE = 32, 8, 256, 192
MOST_NEIGHBORS = 8  # that are retrieved; a variant reads the first k of them
PAPER: dict[str, Any] = {
    "d_model": 128, "n_layers": 4, "ca_layers": (1, 3), "n_heads": 4, "d_k": 32, "d_ff": 512, "n_encoder_layers": 2,
    "encoder_ca_layers": (1,), "own_embeddings": True, "norm": "rms", "final_norm": True, "relative_positions": True,
}  # fmt: skip
SMALL_INIT = {"init_std": 0.05}  # 0.02 at the paper's width of 896, as 1 / sqrt(width)


@dataclass(frozen=True)
class Variant:
    """One thing that is different; left out, the paper's."""

    title: str
    model: dict[str, Any] = field(default_factory=dict)  # values of `RetroConfig`
    k: int = 2  # neighbors that a chunk reads
    reads: str = "NF"  # of a neighbor: its chunk N, the continuation F
    train: dict[str, Any] = field(default_factory=dict)  # values of `TrainConfig`
    beside: str = "paper"  # what it is compared with


VARIANTS = {
    "paper": Variant("the paper's model"),
    "none": Variant("no retrieval", {"ca_layers": ()}),
    "no positions": Variant("no relative positions", {"relative_positions": False}),
    "unconditioned": Variant("encoder not conditioned on the chunk", {"encoder_ca_layers": ()}),
    "N": Variant("neighbors N only, without continuation", reads="N"),
    "F": Variant("continuations F only", reads="F"),
    "k=1": Variant("1 neighbor", k=1),
    "k=4": Variant("4 neighbors", k=4),
    "k=8": Variant("8 neighbors", k=8),
    "every layer": Variant("chunked cross-attention in every layer", {"ca_layers": (0, 1, 2, 3)}),
    "LayerNorm": Variant("LayerNorm", {"norm": "layer"}),
    "no final norm": Variant("no norm before the logits", {"final_norm": False}),
    "small init": Variant("weights of standard deviation 0.05 to begin with", SMALL_INIT),
    "tied": Variant(
        "these, and tied embeddings; beside the one above", SMALL_INIT | {"tied": True}, beside="small init"
    ),
    "shared": Variant("encoder with the decoder's embeddings", {"own_embeddings": False}),
    "narrow": Variant("encoder of half the width", {"d_encoder": 64, "encoder_n_heads": 2, "encoder_d_ff": 256}),
    "dropped": Variant("half of the neighbors kept back in training", train={"missing_neighbors": 0.5}),
    "tutorial": Variant(
        "the tutorial's choices for all of these",
        {"norm": "layer", "final_norm": False, "relative_positions": False, "own_embeddings": False},
    ),
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    seeds: tuple[int, ...]  # of the weights and of the order of the samples
    n_windows: int | None  # the most of each held-out document


FULL, QUICK = Size(400, (0, 1, 2), None), Size(4, (0,), 1)


def prepare(folder: Path) -> None:
    """Texts, database and dataset, in the current folder."""
    import transformers

    from retro.cli.presets import copy_of_models

    folder.mkdir(exist_ok=True)
    texts = copy_of_models(Path(transformers.__file__).parent / "models", folder)
    call("database", str(texts), "--tokenizer", "bpe:2048", "--chunk-len", str(CHUNK_LEN), "--index", "Flat")
    words = ["--chunks-per-sample", str(CHUNKS_PER_SAMPLE), "--skip-range", "1", "--n-neighbors", str(MOST_NEIGHBORS)]
    call("dataset", *words)


def part_of(values: Any, reads: str) -> Any:
    """Neighbors (..., 2m), of which only the chunk or only the continuation is left."""
    values = values.copy() if isinstance(values, np.ndarray) else values.clone()
    if reads == "N":
        values[..., CHUNK_LEN:] = -1
    if reads == "F":
        values[..., :CHUNK_LEN] = -1
    return values


class Reader:
    """An index in which neighbors have only what a variant reads of them."""

    def __init__(self, index: Any, reads: str) -> None:
        self.index, self.reads = index, reads

    def values(self, offsets: np.ndarray) -> np.ndarray:
        return part_of(self.index.values(offsets), self.reads)


def of_variant(batches: Iterable[Any], variant: Variant) -> Iterator[Any]:
    """Batches with as much of the neighbors as a variant reads."""
    for src, tgt, neighbors in batches:
        yield src, tgt, part_of(neighbors[:, :, : variant.k], variant.reads)


def config(variant: Variant, size: Size, seed: int) -> Any:
    """How a variant is trained."""
    from retro.device import pick_device, pick_precision
    from retro.train import TrainConfig

    return TrainConfig(
        batch_size=8,
        steps=size.steps,
        lr=4e-3,
        schedule="cosine",
        warmup=math.ceil(size.steps / 10),
        clip=1.0,
        beta2=0.95,
        weight_decay=0.1,
        precision=pick_precision("auto", pick_device("cpu")),
        seed=seed,
        **variant.train,
    )


def measured(name: str, size: Size, seed: int) -> Path:
    """The file with what came out of a variant."""
    return Path("measured") / name_of(name, size, seed)


def name_of(name: str, size: Size, seed: int) -> str:
    """The name of that file: another recipe has another."""
    v = VARIANTS[name]
    recipe = [PAPER | v.model, v.k, v.reads, asdict(config(v, size, seed)), size.n_windows]
    return sha256_of_json(recipe)[:12] + ".json"


def measure(name: str, size: Size, seed: int) -> None:
    """Train a variant and write what it costs in each held-out document, in bits, with and without its neighbors."""
    import torch

    from retro.database import RetroIndex
    from retro.evaluation.windows import chunk_offsets, is_scored, losses, predicted_bytes, windows
    from retro.model import RetroConfig, RetroModel
    from retro.runs.data import TrainingData
    from retro.runs.optimizers import new_optimizer
    from retro.train import Trainer

    torch.set_num_threads(1)
    variant, data = VARIANTS[name], TrainingData(Path("data"))
    corpus, how = data.corpus, config(variant, size, seed)
    torch.manual_seed(seed)
    shape = RetroConfig(n_vocab=corpus.n_tokens, chunk_len=CHUNK_LEN, **(PAPER | variant.model))
    model = RetroModel.from_config(shape)
    batches = of_variant(data.batches("train", how, 0, size.steps, False), variant)
    optimizer = new_optimizer(model, how, fused=True)
    train_loss = Trainer("cpu", model, batches, optimizer, config=how, n_steps=size.steps)()

    index, offsets = RetroIndex(CHUNK_LEN, data_path="data"), chunk_offsets(corpus, CHUNK_LEN)
    neighbors = np.load("held_out_neighbors.npy")[:, : variant.k]
    neighbors[offsets + CHUNK_LEN > corpus.ends_of(offsets)] = -1  # only whole chunks retrieve
    cut = windows(corpus, WINDOW, STRIDE, size.n_windows)
    first, n_documents = corpus.split("valid").start, len(corpus.split("valid"))
    documents = corpus.document_of(np.arange(corpus.n_train_tokens, corpus.end_of_valid)) - first

    def by_document(per_token: np.ndarray) -> list[float]:
        return np.bincount(documents, per_token, n_documents).tolist()

    found = {"bytes": by_document(predicted_bytes(corpus) * is_scored(corpus, cut))}
    for retrieval, read in (("on", neighbors), ("off", None)):
        reader: Any = Reader(index, variant.reads)
        nats = losses(model, corpus, reader, read, cut, 8, "cpu", f"{name}, {retrieval}")
        found[retrieval] = by_document(nats / math.log(2))
    facts = {"n_parameters": sum(p.numel() for p in model.parameters()), "train_nats": train_loss}
    write_json(measured(name, size, seed), facts | {"by_document": found})


def retrieve_held_out() -> None:
    """The neighbors of the held-out chunks, once for all variants."""
    from retro.database import RetroIndex
    from retro.evaluation.leakage import retrieve
    from retro.evaluation.windows import chunk_offsets
    from retro.text.corpus import open_corpus

    file, corpus = Path("held_out_neighbors.npy"), open_corpus("data")
    if not file.exists():
        offsets = chunk_offsets(corpus, CHUNK_LEN)
        neighbors, _ = retrieve(corpus, RetroIndex(CHUNK_LEN, data_path="data"), offsets, MOST_NEIGHBORS)
        np.save("part.npy", neighbors)
        Path("part.npy").rename(file)


def measure_all(size: Size, workers: int) -> None:
    """Measure each variant with each seed, if that has not been done: in processes that each have one thread."""
    jobs = [(name, seed) for seed in size.seeds for name in VARIANTS]
    left = [(name, seed) for name, seed in jobs if not measured(name, size, seed).exists()]
    print(f"\n{len(jobs) - len(left)} of {len(jobs)} trainings are there; {len(left)} to go", flush=True)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        command = [sys.executable, __file__, "--variant", name, "--seed", str(seed), *["--quick"] * (size == QUICK)]
        done = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed} failed:\n{done.stderr[-3000:]}")
        n = sum(measured(name, size, seed).exists() for name, seed in jobs)
        minutes = (time.perf_counter() - started) / 60
        print(f"{n} of {len(jobs)}: {VARIANTS[name].title}, seed {seed} ({minutes:.0f} minutes)", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, left))


def gathered(size: Size) -> dict[str, Any]:
    """The figures of each variant, over documents and seeds, and what it costs beside the paper's."""
    from retro.evaluation.intervals import judged, ratio_of_sums

    rows: dict[str, Any] = {}
    bits: dict[str, np.ndarray] = {}
    n_bytes = np.zeros(0)
    for name in VARIANTS:
        runs = [json.loads(measured(name, size, seed).read_text()) for seed in size.seeds]
        n_bytes = np.array(runs[0]["by_document"]["bytes"])
        on, off = (np.array([run["by_document"][retrieval] for run in runs]) for retrieval in ("on", "off"))
        bits[name] = on
        rows[name] = {
            "title": VARIANTS[name].title,
            "n_parameters": runs[0]["n_parameters"],
            "train_nats": [run["train_nats"] for run in runs],
            "on": ratio_of_sums(on, n_bytes),
            "off": ratio_of_sums(off, n_bytes),
        }
    costs = judged({name: (bits[name] - bits[v.beside], n_bytes) for name, v in VARIANTS.items() if name != "paper"})
    for name, cost in costs.items():
        rows[name]["cost"] = cost
    return rows


def page(record: dict[str, Any]) -> str:
    """The whole of `ABLATIONS.md`."""
    from retro.evaluation.intervals import format_interval, format_p

    m, size, rows = record["machine"], record["size"], record["variants"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    paper = rows["paper"]
    lines = [
        "# What each part of the paper's model is worth",
        "",
        f"Made by `{record['command']}` on {m['date']}: {m['processor']}, {m['cores']} cores, Python {m['python']}, "
        f"{versions}.",
        f"{record['documents']['train']} modeling files of transformers train ({record['tokens']['train']:,} tokens, "
        f"bpe:2048), {record['documents']['held out']} are held out, none of them a near-duplicate of the others.",
        f"Chunks of {CHUNK_LEN} tokens, samples of {WINDOW}; a decoder of 4 layers and 128 features, an encoder of 2 "
        f"({paper['n_parameters'] / 1e6:.1f} million parameters in all). Each variant differs from the paper's model",
        f"in one thing, and was trained for {size['steps']:,} steps of 8 samples with each of {len(size['seeds'])} "
        "seeds of weights and order.",
        "Bits per byte of held-out files, in windows; in parentheses 95% intervals over documents and seeds",
        "(`retro/evaluation/intervals.py`). A positive cost: the variant needs more bits than the paper's model.",
        "*yes*: it does, *no*: it needs fewer, by p-values corrected for the number of variants (Holm).",
        "",
        "| variant | bits per byte | without neighbors | cost beside the paper's model | costs more | p | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        cost = row.get("cost")
        cells = [f"{format_interval(cost)}", cost["verdict"], format_p(cost["p"])] if cost else ["", "", ""]
        cells = [row["title"], f"{row['on']['value']:.4f}", f"{row['off']['value']:.4f}", *cells]
        lines.append(f"| {' | '.join(cells)} | {row['n_parameters'] / 1e6:.2f} M |")
    lines += ["", "![Cost of each variant beside the paper's model](ablations.png)"]
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, Any], file: Path) -> None:
    """Each variant's cost beside the paper's model, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = sorted((row for row in rows.values() if "cost" in row), key=lambda row: row["cost"]["value"])
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    for y, row in enumerate(shown):
        cost = row["cost"]
        color = {"yes": "tab:red", "no": "tab:green"}.get(cost["verdict"], "tab:gray")
        if cost["low"] is not None:
            axes.plot([cost["low"], cost["high"]], [y, y], color=color, linewidth=2)
        axes.plot(cost["value"], y, "o", color=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["title"] for row in shown])
    axes.set(xlabel="bits per byte more than the paper's model (95% interval)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each, which show nothing but how")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, each with one thread (default: 2)")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one only, where everything is prepared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    if args.variant:
        measure(args.variant, size, args.seed)
        return
    out = HERE / "cache" / "quick" if args.quick else HERE
    place = HERE / "cache" / "ablations"
    place.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    prepare(Path("data"))
    retrieve_held_out()
    Path("measured").mkdir(exist_ok=True)
    measure_all(size, args.workers)

    from retro.text.corpus import open_corpus

    corpus = open_corpus("data")
    record = {
        "command": "make ablations" + " QUICK=1" * args.quick,
        "machine": machine(),
        "size": asdict(size),
        "documents": {"train": len(corpus.split("train")), "held out": len(corpus.split("valid"))},
        "tokens": {"train": corpus.n_train_tokens, "held out": corpus.end_of_valid - corpus.n_train_tokens},
        "variants": gathered(size),
    }
    write_json(out / "ablations.json", record)
    (out / "ABLATIONS.md").write_text(page(record))
    draw(record["variants"], out / "ablations.png")
    print(f"\n{page(record)}\nwritten: {out}/ABLATIONS.md, ablations.json, ablations.png")


if __name__ == "__main__":
    main()
