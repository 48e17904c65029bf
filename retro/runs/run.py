"""The folder of a run: what made it, what came out, and where the latest one is.

A run lies in `logs/NAME/HASH`, named by a hash of everything that shapes it. The same command therefore finds its own
run again. `run.json` says what made it, `run.yaml` repeats it (`retro train --config RUN/run.yaml`), `summary.json` is
there when it is finished.

A folder holds one run of one length. Resuming with another length makes a run of its own beside it, which begins with
a copy of the other's newest checkpoint, has the learning rates of its own length, and says in `run.json` where it goes
on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from retro import parallel
from retro.config import BERT, FROM_DATA, ModelConfig, RetroConfig, TrainConfig, model_config
from retro.errors import (
    ArtifactError,
    DamagedFile,
    InvalidOption,
    MissingArtifact,
    MissingDataOfRun,
    UntrustedPath,
    require_match,
)
from retro.retrofit import Retrofit
from retro.runs.checkpoints import RUN_FILE, checkpoints_of, newest_whole_checkpoint
from retro.runs.data import TrainingData
from retro.runs.models import moved, retrofit_for
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
YAML_FILE, SUMMARY_FILE = "run.yaml", "summary.json"
RUN_FIELDS: Fields = {"train": dict, "model": dict, "dataset": dict, "data_path": str}
ORIGIN_FIELDS: Fields = {"run": str, "step": int, "n_steps": int}
SUMMARY_FIELDS: Fields = {
    "steps": int,
    "n_parameters": int,
    "n_trained_parameters": int,
    "train_bpb": float,
    "valid_bpb": float,
    "valid_bpb_without_retrieval": float,
    "tokens_per_second": float,
    "device": str,
}


@dataclass(frozen=True)
class Origin:
    """The run that another one goes on from, with another length; their folders lie side by side."""

    run: str  # NAME/HASH
    step: int  # of its checkpoint
    n_steps: int  # its length


@dataclass(frozen=True)
class Run:
    """A run that is to be made or continued."""

    folder: Path
    config: TrainConfig
    shape: ModelConfig
    n_steps: int
    interval: int  # steps between validations and checkpoints
    continues: Origin | None = None
    # At its beginning, where finding the run took a base, which is large and loaded once.
    model: Retrofit | None = field(default=None, repr=False, compare=False)

    @property
    def first_step(self) -> int:
        """The step that it begins with, from 0."""
        return self.continues.step if self.continues else 0

    @property
    def origin(self) -> Path | None:
        """The folder of the run that it goes on from."""
        return self.folder.with_name(Path(self.continues.run).name) if self.continues else None

    def summary(self) -> dict[str, Any] | None:
        """What came out, if it has made its steps already."""
        if not (self.folder / SUMMARY_FILE).exists():
            return None
        summary = read_manifest(self.folder / SUMMARY_FILE, SUMMARY_FIELDS)
        return summary if summary["steps"] == self.n_steps else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what came out; on rank 0, while the others wait."""
        parallel.on_rank_zero(lambda: write_manifest(self.folder / SUMMARY_FILE, dict(summary)))


def find_run(
    data: TrainingData,
    name: str | None,
    config: TrainConfig | None,
    model_shape: Mapping[str, Any],
    resume: Path | None,
    device: torch.device | str = "cpu",
) -> Run:
    """The run of these configs on some data, or the one to `resume`, or of another length the one that goes on from it.

    * `config` has the length where a run is resumed, and `model_shape` where its base is now, if that was moved; the
      rest is as the run was made
    * `device` is where it will train

    Raises `StaleArtifact` if the data have changed: the neighbors since, or all of it since a run was made.
    """
    if resume is not None:
        return _resumed(data, config, resume, model_shape.get("base"))
    data.require_current()
    config = config or TrainConfig()
    model = None
    if "base" in model_shape:
        model = retrofit_for(data.corpus, data.chunk_len, dict(model_shape), config.seed, device)
        shape: ModelConfig = model.config
        name = name or f"{data.corpus.name}_retrofit" + "_no_retrieval" * (not shape.ca_layers)
    else:
        shape = RetroConfig(**{"n_vocab": data.corpus.n_tokens, "chunk_len": data.chunk_len, **model_shape})
        name = name or data.corpus.name + "_no_retrieval" * (not shape.ca_layers)
    run = _run_of(LOGS / name / _hash_of(data, config, shape, {}), data, config, shape, None)
    return replace(run, model=model)


def _run_of(folder: Path, data: TrainingData, config: TrainConfig, shape: ModelConfig, continues: Origin | None) -> Run:
    per_epoch = data.n_batches("train", config.batch_size)
    n_steps = config.steps or config.epochs * per_epoch
    return Run(folder, config, shape, n_steps, config.interval or per_epoch, continues)


def _hash_of(data: TrainingData, config: TrainConfig, shape: ModelConfig, others: Mapping[str, Any]) -> str:
    """The name of a run's folder, which tells it from all that anything else shaped."""
    # What there was no choice of once is left out, so that runs from then are found; and what changes no number.
    once = (("retriever", BERT), ("optimizer", "adam"))
    train = {name: v for name, v in asdict(config).items() if name != "save_minutes" and (name, v) not in once}
    dataset = {name: value for name, value in data.manifest.items() if (name, value) not in once}
    shaped_by = {"train": train, "model": asdict(shape), "dataset": dataset, "format": FORMAT_VERSION}
    return sha256_of_json({**shaped_by, **others})[:16]


def _resumed(data: TrainingData, wanted: TrainConfig | None, resume: Path, base: str | None) -> Run:
    """The run in a folder, or if another length is wanted the one that goes on from its newest checkpoint."""
    if resume.name in ("", "..") or resume.is_symlink():  # what lies beside it lies beside the run itself
        resume = resume.resolve()
    manifest = read_run(resume)
    require_match(resume / RUN_FILE, {"retriever": BERT} | manifest["dataset"], data.manifest)
    saved, shape = TrainConfig(**manifest["train"]), model_config(manifest["model"])
    run = _run_of(resume, data, saved, moved(shape, base), _origin_of(resume / RUN_FILE, manifest))
    if wanted is None:
        return run
    config = replace(saved, steps=wanted.steps, epochs=saved.epochs if wanted.steps else wanted.epochs)
    longer = _run_of(resume, data, config, run.shape, None)
    if longer.n_steps == run.n_steps:
        return run
    if (checkpoint := newest_whole_checkpoint(resume)) is None:
        raise MissingArtifact(resume / "checkpoints", f"{resume} holds no whole checkpoint to go on from")
    step = int(checkpoint.name)
    if longer.n_steps < step:
        name = "steps" if config.steps else "epochs"
        raise InvalidOption(
            name, getattr(config, name), f"makes {longer.n_steps:,} steps, but {resume} has made {step:,}"
        )
    origin = Origin("/".join(resume.resolve().parts[-2:]), step, run.n_steps)
    folder = resume.with_name(_hash_of(data, config, shape, {"continues": asdict(origin)}))
    return replace(longer, folder=folder, continues=origin)


def saved_prompt(run: Run) -> str | None:
    """The prompt that a run was made with, if it was begun before, or else the one that it goes on from."""
    for folder in (run.folder, run.origin):
        try:
            if folder is not None:
                return str(yaml.safe_load((folder / YAML_FILE).read_text(encoding="utf-8"))["prompt"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
            continue
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
            **({"continues": asdict(run.continues)} if run.continues else {}),
        },
    )
    shape = {name: list(v) if isinstance(v, tuple) else v for name, v in model.items() if name not in FROM_DATA}
    name = run.folder.resolve().parent.name
    options = {"data_path": str(data.path), "name": name, "prompt": prompt, **shape, **train}
    options |= {"resume": str(run.origin)} if run.origin else {}
    with atomic_write(run.folder / YAML_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


def read_run(run: Path) -> dict[str, Any]:
    """What made a run. Raises if its `run.json` is missing or damaged."""
    path = run / RUN_FILE
    manifest = read_manifest(path, RUN_FIELDS)
    require_fields(path, manifest["dataset"], HEADER_FIELDS)
    _origin_of(path, manifest)
    try:
        TrainConfig(**manifest["train"])
        model_config(manifest["model"])
    except (TypeError, ValueError) as error:
        raise DamagedFile(path, f"describes no run ({error})") from None
    return manifest


def _origin_of(path: Path, manifest: Mapping[str, Any]) -> Origin | None:
    """Where a run goes on from, if it does. Raises `DamagedFile` if that is no run."""
    if "continues" not in manifest:
        return None
    require_fields(path, manifest, {"continues": dict})
    require_fields(path, found := manifest["continues"], ORIGIN_FIELDS)
    if Path(found["run"]).name in ("", ".."):
        raise DamagedFile(path, f"goes on from {found['run']!r:.80}, which is no run")
    return Origin(**{name: found[name] for name in ORIGIN_FIELDS})


def latest_run(data_path: Path, logs: Path = LOGS, reads_neighbors: bool = True) -> Path:
    """The run on the data in a folder that has written a checkpoint last.

    * `reads_neighbors` passes over models without retrieval
    """
    found = []
    for run in runs_below(logs):
        try:
            manifest = read_run(run)
        except ArtifactError:
            continue
        written, is_of_data = _last_written(run), Path(manifest["data_path"]).resolve() == data_path.resolve()
        if written and is_of_data and (manifest["model"]["ca_layers"] or not reads_neighbors):
            found.append((written, run))
    if not found:
        raise MissingArtifact(logs, f"there is no trained run of the data in {data_path} below {logs}")
    return max(found)[1]


def runs_below(logs: Path) -> list[Path]:
    """The folders of all runs, in the order of their names."""
    return sorted(file.parent for file in logs.glob(f"*/*/{RUN_FILE}"))


def run_in(folder: Path) -> Path:
    """The folder of a run as it is; for a folder of runs, `logs/NAME`, the one that has written a checkpoint last."""
    runs = [] if (folder / RUN_FILE).exists() else [file.parent for file in folder.glob(f"*/{RUN_FILE}")]
    return max(runs, key=_last_written, default=folder)


def _last_written(run: Path) -> int:
    """When a run has written its last checkpoint, in nanoseconds; 0 if it has written none."""
    checkpoints = checkpoints_of(run)
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
