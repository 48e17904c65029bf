"""Where tensors live, decided once, at the edge of the program."""

from __future__ import annotations

import os
from typing import Any

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


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is `bf16` where the device computes faster so, else `fp32`."""
    return ("bf16" if bf16_is_faster(device) else "fp32") if name == "auto" else name


def bf16_is_faster(device: torch.device) -> bool:
    """Whether the device computes faster in bfloat16 than in float32.

    Of processors, those with AMX do, and AMD's with the instructions of AVX-512 for it. Intel's that have only these
    multiply matrices in bfloat16 at 0.6 times the speed of float32; others have to convert every number.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    by_avx512 = processor.get("avx512_bf16", False) and "Intel" not in processor.get("cpu_name", "")
    return device.type == "cpu" and (processor.get("amx_bf16", False) or by_avx512)
