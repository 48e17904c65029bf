"""The folder of a run: what made it, what came out, and where the latest one is.

A run lies in `logs/NAME/HASH`, named by a hash of everything that shapes it. The same command therefore finds its own
run again. `run.json` says what made it, `run.yaml` repeats it (`retro train --config RUN/run.yaml`), `summary.json` is
there when it is finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from retro import parallel
from retro.config import FROM_DATA, RetroConfig, TrainConfig
from retro.errors import ArtifactError, DamagedFile, MissingArtifact, MissingDataOfRun, UntrustedPath, require_match
from retro.runs.data import TrainingData
from retro.storage.files import atomic_write
from retro.storage.manifests import (
    FORMAT_VERSION,
    Fields,
    package_versions,
    read_manifest,
    require_fields,
    sha256_of_json,
    write_manifest,
)
from retro.storage.sample_file import HEADER_FIELDS
from retro.text.corpus import Corpus, open_corpus

LOGS = Path("logs")
RUN_FILE, YAML_FILE, SUMMARY_FILE = "run.json", "run.yaml", "summary.json"
RUN_FIELDS: Fields = {"train": dict, "model": dict, "dataset": dict, "data_path": str}
SUMMARY_FIELDS: Fields = {
    "steps": int,
    "n_parameters": int,
    "train_bpb": float,
    "valid_bpb": float,
    "valid_bpb_without_retrieval": float,
    "tokens_per_second": float,
    "device": str,
}


@dataclass(frozen=True)
class Run:
    """A run that is to be made or continued."""

    folder: Path
    config: TrainConfig
    shape: RetroConfig
    n_steps: int
    interval: int  # steps between validations and checkpoints

    def summary(self) -> dict[str, Any] | None:
        """What came out, if it has made its steps already."""
        if not (self.folder / SUMMARY_FILE).exists():
            return None
        summary = read_manifest(self.folder / SUMMARY_FILE, SUMMARY_FIELDS)
        return summary if summary["steps"] >= self.n_steps else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what came out; on rank 0, while the others wait."""
        parallel.on_rank_zero(lambda: write_manifest(self.folder / SUMMARY_FILE, dict(summary)))


def find_run(
    data: TrainingData,
    name: str | None,
    config: TrainConfig | None,
    model_shape: Mapping[str, Any],
    resume: Path | None,
) -> Run:
    """The run of these configs on some data, or the one to `resume`, with the length of `config` if that is given.

    Raises `StaleArtifact` if the data have changed: the neighbors since, or all of it since a run was made.
    """
    if resume is None:
        data.require_current()
        config = config or TrainConfig()
        shape = RetroConfig(**{"n_vocab": data.corpus.n_tokens, "chunk_len": data.chunk_len, **model_shape})
        shaped_by = {
            "train": asdict(config),
            "model": asdict(shape),
            "dataset": data.manifest,
            "format": FORMAT_VERSION,
        }
        name = name or data.corpus.name + "_no_retrieval" * (not shape.ca_layers)
        folder = LOGS / name / sha256_of_json(shaped_by)[:16]
    else:
        folder, manifest = resume, read_run(resume)
        require_match(resume / RUN_FILE, manifest["dataset"], data.manifest)
        saved, shape = TrainConfig(**manifest["train"]), RetroConfig.from_json(manifest["model"])
        config = replace(saved, steps=config.steps, epochs=config.epochs) if config else saved
    per_epoch = data.n_batches("train", config.batch_size)
    return Run(folder, config, shape, config.steps or config.epochs * per_epoch, config.interval or per_epoch)


def saved_prompt(run: Run) -> str | None:
    """The prompt that a run was made with, if it was begun before."""
    try:
        return str(yaml.safe_load((run.folder / YAML_FILE).read_text(encoding="utf-8"))["prompt"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return None


def write_run(run: Run, data: TrainingData, prompt: str) -> None:
    """Write `run.json`, and `run.yaml` with the same as options of `retro train`; on rank 0."""
    if parallel.rank():
        return
    train, model = asdict(run.config), asdict(run.shape)
    write_manifest(
        run.folder / RUN_FILE,
        {
            "train": train,
            "model": model,
            "dataset": data.manifest,
            "data_path": str(data.path),
            "versions": package_versions(),
        },
    )
    shape = {name: list(v) if isinstance(v, tuple) else v for name, v in model.items() if name not in FROM_DATA}
    options = {"data_path": str(data.path), "name": run.folder.parent.name, "prompt": prompt, **shape, **train}
    with atomic_write(run.folder / YAML_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


def read_run(run: Path) -> dict[str, Any]:
    """What made a run. Raises if its `run.json` is missing or damaged."""
    path = run / RUN_FILE
    manifest = read_manifest(path, RUN_FIELDS)
    require_fields(path, manifest["dataset"], HEADER_FIELDS)
    try:
        TrainConfig(**manifest["train"])
        RetroConfig.from_json(manifest["model"])
    except (TypeError, ValueError) as error:
        raise DamagedFile(path, f"describes no run ({error})") from None
    return manifest


def latest_run(data_path: Path, logs: Path = LOGS, reads_neighbors: bool = True) -> Path:
    """The run on the data in a folder that has written a checkpoint last.

    * `reads_neighbors` passes over models without retrieval
    """
    found = []
    for file in logs.glob(f"*/*/{RUN_FILE}"):
        try:
            manifest = read_run(file.parent)
        except ArtifactError:
            continue
        written, is_of_data = _last_written(file.parent), Path(manifest["data_path"]).resolve() == data_path.resolve()
        if written and is_of_data and (manifest["model"]["ca_layers"] or not reads_neighbors):
            found.append((written, file.parent))
    if not found:
        raise MissingArtifact(logs, f"there is no trained run of the data in {data_path} below {logs}")
    return max(found)[1]


def run_in(folder: Path) -> Path:
    """The folder of a run as it is; for a folder of runs, `logs/NAME`, the one that has written a checkpoint last."""
    runs = [] if (folder / RUN_FILE).exists() else [file.parent for file in folder.glob(f"*/{RUN_FILE}")]
    return max(runs, key=_last_written, default=folder)


def _last_written(run: Path) -> int:
    """When a run has written its last checkpoint, in nanoseconds; 0 if it has written none."""
    checkpoints = sorted((run / "checkpoints").glob("[0-9]*"))
    return checkpoints[-1].stat().st_mtime_ns if checkpoints else 0


def data_path_of(run: Path, manifest: Mapping[str, Any], named: Path | None) -> Path:
    """The folder of a run's data: as named, or, if that is in the current folder, as it was when the run was made."""
    path = named or Path(manifest["data_path"])
    if named is None and not path.resolve().is_relative_to(Path.cwd().resolve()):
        raise UntrustedPath(
            path, f"{run / RUN_FILE} says that its data lie in {path}, which is not in the current folder"
        )
    if not path.exists():
        where = "" if named else f", where {run} was made,"
        raise MissingDataOfRun(path, f"{path}{where} does not exist; name the folder of the run's data")
    return path


def corpus_of_run(run: Path, manifest: Mapping[str, Any], path: Path, named: bool) -> Corpus:
    """The corpus in a folder of data, if the run can be used with it.

    * `named` says whether the user has named the folder. Then the corpus may be any that has the run's tokenizer; else
      it is the run's own

    Raises `StaleArtifact`, or `MissingDataOfRun` where other data have taken the place of the run's.
    """
    corpus, dataset = open_corpus(path), manifest["dataset"]
    if not named and corpus.sha256 != dataset["corpus_sha256"]:
        raise MissingDataOfRun(
            path,
            f"{path} holds another corpus (corpus_sha256 {corpus.sha256[:12]}) than {run} was made with "
            f"({dataset['corpus_sha256'][:12]}); name the folder of the run's data, or this one if you mean it",
        )
    require_match(run / RUN_FILE, dataset, {"tokenizer_sha256": corpus.tokenizer.sha256})
    return corpus
