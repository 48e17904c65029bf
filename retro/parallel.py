"""Several processes, started by `torchrun`, one after the other or side by side.

Every stage runs under `torchrun --nproc-per-node N -m retro.STAGE ...` with no option of its own: `torchrun` tells
each process its rank and how many there are, in its environment. What can be split is split by number (shards of
text, shards of samples, the samples of a step). What cannot, rank 0 does while the others wait. What is written does
not depend on how many there were.

The process group is Hugging Face accelerate's, the same that training uses: gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # how long processes wait for the slowest


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def n_processes() -> int:
    """How many processes there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_group(device: torch.device | None = None) -> PartialState:
    """Join the other processes, which compute on this kind of device; later calls find what the first one joined."""
    import torch
    from accelerate import PartialState

    use_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    if n_processes() > 1 and not torch.distributed.is_initialized():
        # Each attempt has names of its own: what was restarted would else meet the addresses of the dead (torch 2.13).
        store, *_ = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        torch.distributed.init_process_group(
            "gloo" if use_cpu else "nccl", store=store, rank=rank(), world_size=n_processes(), timeout=PATIENCE
        )
        atexit.register(torch.distributed.destroy_process_group)
    return PartialState(cpu=use_cpu)


def wait_for_everyone() -> None:
    """Return when every process has come here."""
    if n_processes() > 1:
        join_group().wait_for_everyone()


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """What `work` returns on rank 0, None on the others, which wait until it is done."""
    result = work() if rank() == 0 else None
    wait_for_everyone()
    return result


def broadcast_from_rank_zero(look: Callable[[], int]) -> int:
    """The number that `look` returns on rank 0, on all of them: they go the same way."""
    seen = int(look()) if rank() == 0 else 0
    if n_processes() > 1:
        import torch

        told = torch.tensor([seen], dtype=torch.int64, device=join_group().device)
        torch.distributed.broadcast(told, src=0)
        seen = int(told.item())
    return seen


def my_share(numbers: list[int]) -> list[int]:
    """Those of the numbers that are this process's to work on."""
    return [number for number in numbers if number % n_processes() == rank()]
