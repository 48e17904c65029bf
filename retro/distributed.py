"""Several processes, started by `torchrun`, one after the other or side by side.

Every stage runs under `torchrun --nproc-per-node N -m retro.STAGE ...` with no option of its own: `torchrun` tells
each process its number and how many there are, in its environment. What can be split is split by number (shards of
text, blocks of samples, the samples of a step); what cannot, the first process does while the others wait. What is
written does not depend on how many there were.

The process group is Hugging Face accelerate's, the same that training uses: gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from retro import artifacts

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


def join(device: torch.device | None = None) -> PartialState:
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


def wait() -> None:
    """Return when every process has come here."""
    if n_processes() > 1:
        join().wait_for_everyone()


def first(work: Callable[[], T]) -> T | None:
    """What `work` returns in the first process, None in the others, which wait until it is done."""
    result = work() if rank() == 0 else None
    wait()
    return result


def agreed(look: Callable[[], int]) -> int:
    """The number that `look` returns in the first process, in all of them: they go the same way."""
    seen = look() if rank() == 0 else 0
    if n_processes() > 1:
        import torch

        told = torch.tensor([seen], device=join().device)
        torch.distributed.broadcast(told, src=0)
        seen = int(told.item())
    return seen


def share(numbers: list[int]) -> list[int]:
    """Those of the numbers that are this process's to work on."""
    return [number for number in numbers if number % n_processes() == rank()]


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """`retro.artifacts.only_writer`, of which the first process is the holder for all."""
    if rank():
        yield
        return
    with artifacts.only_writer(folder):
        yield
