"""Checkpoints: weights and the state of training, written whole, and read only as they were written.

A checkpoint is a folder: `config.json`, `model.safetensors`, `optimizer.safetensors`, and `state.json`, which holds the
hashes of the others. Where weights are sharded over processes, each process writes its rows of every tensor
(`model-00000-of-00002.safetensors`, ...); one process reads them together again.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from retro import parallel
from retro.config import ModelConfig, model_config
from retro.errors import ArtifactError, CannotWrite, DamagedFile, MissingArtifact
from retro.progress import note
from retro.retrofit import Model
from retro.runs.models import filled, moved, require_shapes
from retro.storage.files import TEMPORARY, naming_what_cannot_be_written, sha256_of_file
from retro.storage.manifests import Fields, read_manifest, write_manifest

RUN_FILE = "run.json"  # tells the folder of a run from that of a checkpoint
STATE_FIELDS: Fields = {
    "step": int,
    "seconds": float,
    "tokens": int,
    "loss_from": int,
    "loss_sum": float,
    "loss_tokens": int,
    "train_bpb": float,
}


@dataclass
class Progress:
    """How far training has come, besides weights and optimizer."""

    step: int = 0  # that comes next
    seconds: float = 0.0  # of training
    tokens: int = 0  # predicted in that time, over all processes
    loss_from: int = 0  # the first step since the last validation
    loss_sum: float = 0.0  # of the tokens predicted since then, in nats
    loss_tokens: int = 0  # how many these are; 0 where an interval is closed
    train_bpb: float = 0.0  # bits per byte, in the last whole interval


def load_model(folder: str | Path, device: torch.device | str = "cpu", base: str | None = None) -> Model:
    """The model saved in a checkpoint, or the newest checkpoint of a run's folder, which holds a `run.json`.

    * `base` is where the base of a `Retrofit` is now; left out, where it was

    Raises `MissingArtifact` when there is none, `DamagedFile` when it is damaged, `InvalidOption` where its base is not
    the one that it was trained with.
    """
    folder = newest_checkpoint(Path(folder))
    if (folder / "state.json").exists():
        verify_checkpoint(folder)
    path = folder / "config.json"
    values = read_manifest(path)
    try:
        shape = model_config(values)
    except (TypeError, ValueError) as error:
        raise DamagedFile(path, f"describes no model ({error})") from None
    return filled(moved(shape, base), load_tensors(folder, "model"), folder, device).to(device)


def load_weights(folder: Path, model: Model) -> None:
    """Take up the weights of a whole checkpoint of this model. Raises `DamagedFile` if they do not fit it."""
    require_shapes(model.state_dict(), tensors := load_tensors(folder, "model"), folder)
    model.load_state_dict(tensors)


def save_model(folder: Path, model: Model, config: ModelConfig) -> None:
    """Write `model.safetensors` and `config.json` into a folder; of a `Retrofit` what was added, not its base."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, "model", model.state_dict())
    write_manifest(folder / "config.json", asdict(config))


def save_checkpoint(
    run: Path,
    model: Model,
    config: ModelConfig,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    interval: int,
) -> None:
    """Write `checkpoints/STEP`, whole or not at all; of the earlier ones the last is kept that ended an interval.

    Where the weights are sharded over processes, each writes its own rows, and rank 0 the rest.
    """
    folder = run / "checkpoints" / f"{progress.step:08d}"
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")

    def clear() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    try:
        parallel.on_rank_zero(clear)
        tensors = {"rng": torch.get_rng_state()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{key}": value for key, value in state.items()}
        save_tensors(temporary, "model", model.state_dict())
        save_tensors(temporary, "optimizer", tensors)
        parallel.wait_for_everyone()
        if parallel.rank():
            return
        write_manifest(temporary / "config.json", asdict(config))
        hashes = {file.name: sha256_of_file(file) for file in sorted(temporary.iterdir())}
        write_manifest(temporary / "state.json", asdict(progress) | {"files": hashes})
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except BaseException as error:  # safetensors raises its own kind for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CannotWrite(folder, f"cannot write {folder}: {error}. Earlier checkpoints are intact") from error
    remove_earlier(run, progress.step, interval)


def remove_earlier(run: Path, step: int, interval: int) -> None:
    """Remove the checkpoints before `step`, which is whole, but for the last that ended an interval."""
    earlier = [p for p in checkpoints_of(run) if int(p.name) < step]
    at_interval = [p for p in earlier if int(p.name) % interval == 0]
    for other in set(earlier) - set(at_interval[-1:]):
        shutil.rmtree(other)


def copy_checkpoint(source: Path, run: Path) -> Path:
    """Copy another run's checkpoint into a run's folder, whole or not at all, on rank 0; returns where it is.

    Raises `MissingArtifact` when it is not there, `DamagedFile` when it is damaged.
    """
    folder = run / "checkpoints" / source.name
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")

    def copy() -> None:
        if not source.exists():
            raise MissingArtifact(source, f"{source}, from which {run} goes on, does not exist")
        verify_checkpoint(source)
        with naming_what_cannot_be_written(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source, temporary)
            os.replace(temporary, folder)
            os.utime(folder)  # the latest run is the one whose checkpoint was written last

    parallel.on_rank_zero(copy)
    return folder


def set_aside_after(run: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`, from which training goes on: they are damaged.

    `00000012` becomes `00000012.damaged`, so that a new one can take its place, and nothing is lost.
    """

    def rename() -> None:
        for folder in _numbered(run):
            if int(folder.name) > step:
                free = (folder.with_name(f"{folder.name}.damaged{i or ''}") for i in itertools.count())
                aside = next(path for path in free if not path.exists())
                folder.rename(aside)
                note(f"{folder} is renamed to {aside.name}")

    parallel.on_rank_zero(rename)


def _numbered(run: Path) -> list[Path]:
    """The folders of a run that have a checkpoint's name, the newest last."""
    return sorted((p for p in (run / "checkpoints").glob("*") if p.name.isdecimal()), key=lambda p: int(p.name))


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return [p for p in _numbered(run) if (p / "config.json").exists()]


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint and no run's, else the last of its `checkpoints/`."""
    if (folder / "config.json").exists() and not (folder / RUN_FILE).exists():
        return folder
    if not (found := checkpoints_of(folder)):
        raise MissingArtifact(folder / "checkpoints", f"{folder} holds no checkpoint")
    return found[-1]


def newest_whole_checkpoint(run: Path) -> Path | None:
    """A run's newest checkpoint that is as it was written, None without one; damaged ones are named and passed over.

    All processes go the way of rank 0.
    """

    def look() -> int:
        for folder in reversed(checkpoints_of(run)):
            try:
                verify_checkpoint(folder)
                return int(folder.name)
            except ArtifactError as error:
                note(f"{error}. It is passed over.")
        return -1

    step = parallel.broadcast_from_rank_zero(look)
    return None if step < 0 else run / "checkpoints" / f"{step:08d}"


def verify_checkpoint(folder: Path) -> None:
    """Raise `DamagedFile` if a file of a checkpoint is missing, or has not the bytes that were written."""
    hashes = read_manifest(folder / "state.json", {"files": dict})["files"]
    if "config.json" not in hashes or any(Path(name).name != name for name in hashes):
        raise DamagedFile(folder / "state.json", "names other files than a checkpoint's")
    for name, expected in hashes.items():
        found = sha256_of_file(folder / name) if (folder / name).exists() else "no file"
        if found != expected:
            raise DamagedFile(folder / name, f"has sha256 {found}, but its state.json says {expected}")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Take up the optimizer of a checkpoint, and torch's random numbers; returns how far training had come."""
    state = read_manifest(folder / "state.json", STATE_FIELDS)
    tensors = load_tensors(folder, "optimizer")
    saved, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {}
    try:
        torch.set_rng_state(tensors.pop("rng"))
        for name, tensor in tensors.items():
            number, key = name.split(".")
            values = saved["state"].setdefault(int(number), {})
            values[key] = sharded_like(parameters[int(number)], tensor)
        optimizer.load_state_dict(saved)
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise DamagedFile(folder / "optimizer.safetensors", f"holds no optimizer of this model ({error})") from None
    return Progress(**{name: state[name] for name in STATE_FIELDS})


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as `STEM.safetensors`; where some are sharded over processes, each process its own rows."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    rank, size = parallel.rank(), parallel.n_processes()
    own = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous().cpu()
        for name, tensor in tensors.items()
        if rank == 0 or isinstance(tensor, DTensor)
    }
    if sharded:
        save_file(own, folder / f"{stem}-{rank:05d}-of-{size:05d}.safetensors")
    elif rank == 0:
        save_file(own, folder / f"{stem}.safetensors")


def load_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Whole tensors of what `save_tensors` wrote in however many processes. Raises `DamagedFile`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or [folder / f"{stem}.safetensors"]
    if len(files) > 1 and not files[-1].stem.endswith(f"-{len(files) - 1:05d}-of-{len(files):05d}"):
        raise DamagedFile(folder, f"lacks some of the files that {files[-1].name} belongs to")
    read = []
    for file in files:
        try:
            read.append(load_file(file))
        except (SafetensorError, OSError) as error:
            raise DamagedFile(file, f"is damaged ({str(error).splitlines()[0][:160]})") from None
    try:  # what is not sharded is in the first file only
        return {
            name: torch.cat([part[name] for part in read]) if name in read[-1] and len(read) > 1 else tensor
            for name, tensor in read[0].items()
        }
    except (KeyError, RuntimeError) as error:
        raise DamagedFile(folder, f"has files of {stem} that do not fit together ({error})") from None


def sharded_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor sharded over processes as a parameter is, if it is and has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor
