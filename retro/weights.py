"""Weights on disk: safetensors, whole or in parts, and checkpoints that are as they were written.

A checkpoint is a folder: `config.json`, `model.safetensors`, `optimizer.safetensors`, and `state.json`, which
holds the hashes of the others. Where weights are spread over processes, each process writes its rows of every
tensor (`model-00000-of-00002.safetensors`, ...); one process reads them together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from retro import distributed
from retro.artifacts import read_json, require_match, sha256_of_file

REPAIR = "delete the folder to fall back to an older checkpoint"


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as `STEM.safetensors`; where some are spread over processes, each process its own rows."""
    from safetensors.torch import save_file
    from torch.distributed.tensor import DTensor

    spread = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    rank, size = distributed.rank(), distributed.n_processes()
    own = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous().cpu()
        for name, tensor in tensors.items()
        if rank == 0 or isinstance(tensor, DTensor)
    }
    if spread:
        save_file(own, folder / f"{stem}-{rank:05d}-of-{size:05d}.safetensors")
    elif rank == 0:
        save_file(own, folder / f"{stem}.safetensors")


def load_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Whole tensors of what `save_tensors` wrote in however many processes. Raises `ValueError` if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or [folder / f"{stem}.safetensors"]
    if len(files) > 1 and not files[-1].stem.endswith(f"-{len(files) - 1:05d}-of-{len(files):05d}"):
        raise ValueError(f"{folder} lacks some of the parts that {files[-1].name} belongs to; {REPAIR}")
    parts = []
    for file in files:
        try:
            parts.append(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged ({str(error).splitlines()[0][:160]}); {REPAIR}") from None
    try:  # what is not spread is in the first part only
        return {
            name: torch.cat([part[name] for part in parts]) if name in parts[-1] and len(parts) > 1 else tensor
            for name, tensor in parts[0].items()
        }
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: the parts of {stem} do not fit together ({error}); {REPAIR}") from None


def spread_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor spread over processes as a parameter is, if it is and has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def newest_checkpoint(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the last of its `checkpoints/`."""
    if (folder / "config.json").exists():
        return folder
    found = sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if (p / "config.json").exists())
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint. Train a model: python -m retro.train")
    return found[-1]


def verify_checkpoint(folder: Path) -> None:
    """Raise `ValueError` if a file of a checkpoint is missing, or has not the bytes that were written."""
    repair = f"delete {folder} to fall back to an older checkpoint"
    hashes = read_json(folder / "state.json", repair, {"files": dict})["files"]
    if "config.json" not in hashes or any(Path(name).name != name for name in hashes):
        raise ValueError(f"{folder / 'state.json'} names other files than a checkpoint's; {repair}")
    for name, expected in hashes.items():
        found = sha256_of_file(folder / name) if (folder / name).exists() else "no file"
        require_match(folder / name, {"sha256": found}, {"sha256": expected}, repair)
