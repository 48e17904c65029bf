"""Where tensors live, decided once, at the edge of the program."""

from __future__ import annotations

import os

import torch

from retro import parallel
from retro.errors import InvalidOption


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA if there is one, else Apple's GPU, else the CPU; of several processes each takes a GPU.

    Raises `ValueError` for a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's number of the process on its machine
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOption("device", name, f"cannot be used here ({reason}); use auto or cpu") from None
    if parallel.n_processes() > 1:
        parallel.join_group(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; elsewhere it works, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
