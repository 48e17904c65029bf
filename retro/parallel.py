"""Several processes, started by `torchrun`, one after the other or side by side.

Every stage runs under `torchrun --nproc-per-node N -m retro.STAGE ...` with no option of its own: `torchrun` tells
each process its rank and how many there are, in its environment. What can be split is split by number (shards of
text, shards of samples, the samples of a step). What cannot, rank 0 does while the others wait. What is written does
not depend on how many there were.

The process group is Hugging Face accelerate's, the same that training uses: gloo on CPUs, NCCL on GPUs.

When a process dies, `torchrun` stops the others; where a whole machine dies, they have to find out. What all compute
together ends with an error after `PATIENCE`. Work that one process does alone, or its share of shards, may take hours;
so each process gives a sign of life every few seconds, and who waits, waits as long as the others do.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from retro.errors import LostProcess

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # with a process that gives no sign of life, or does not come to a joint computation
BEAT = timedelta(seconds=10)  # between two signs of life
LONGEST_PAUSE = 0.5  # seconds between two looks at who has come
_MEETINGS = itertools.count()


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
        torch.distributed.init_process_group(
            "gloo" if use_cpu else "nccl", store=_store(), rank=rank(), world_size=n_processes(), timeout=PATIENCE
        )
        atexit.register(torch.distributed.destroy_process_group)
    return PartialState(cpu=use_cpu)


@cache
def _store() -> torch.distributed.Store:
    """Through what the processes find each other; from the first call on, this one gives signs of life in it."""
    import torch

    # Each attempt has names of its own: what was restarted would else meet the addresses of the dead (torch 2.13).
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=PATIENCE))
    store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def beat() -> None:
        while True:
            try:
                store.add(f"beats of {rank()}", 1)
            except RuntimeError:  # who kept the store has ended
                return
            time.sleep(BEAT.total_seconds())

    threading.Thread(target=beat, daemon=True).start()
    return store


def _meet() -> None:
    """Return when every process has come here. Raises `LostProcess` when one gives no sign of life."""
    store, meeting, pause = _store(), f"meeting {next(_MEETINGS)}", 0.001
    seen: dict[int, tuple[int, float]] = {}  # of each process: how many signs, and when the last one came
    store.add(meeting, 1)
    looked = time.monotonic()
    while store.add(meeting, 0) < n_processes():
        time.sleep(pause)
        pause, now = min(2 * pause, LONGEST_PAUSE), time.monotonic()
        if now - looked < BEAT.total_seconds():
            continue
        looked = now
        for other in range(n_processes()):
            beats = store.add(f"beats of {other}", 0)
            if other not in seen or beats != seen[other][0]:
                seen[other] = beats, now
            elif (silence := now - seen[other][1]) > PATIENCE.total_seconds():
                raise LostProcess(
                    f"process {other} of {n_processes()} has given no sign of life for {silence:.0f} s; start again, "
                    "and what is finished stays finished"
                )


def wait_for_everyone() -> None:
    """Return when every process has come here, however long each takes. Raises `LostProcess` when one has died."""
    if n_processes() > 1:
        try:
            _meet()
        except RuntimeError as error:  # torch's
            raise LostProcess(f"the process that keeps the store has ended ({str(error).splitlines()[0]})") from None
        join_group().wait_for_everyone()  # at once: all are here. Nobody leaves while another still asks the store


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """What `work` returns on rank 0, None on the others, which wait until it is done."""
    if n_processes() > 1:
        _store()  # signs of life from now on
    result = work() if rank() == 0 else None
    wait_for_everyone()
    return result


def broadcast_from_rank_zero(look: Callable[[], int]) -> int:
    """The number that `look` returns on rank 0, on all of them: they go the same way."""
    if n_processes() > 1:
        _store()
    seen = int(look()) if rank() == 0 else 0
    if n_processes() > 1:
        import torch

        wait_for_everyone()
        told = torch.tensor([seen], dtype=torch.int64, device=join_group().device)
        torch.distributed.broadcast(told, src=0)
        seen = int(told.item())
    return seen


def my_share(numbers: list[int]) -> list[int]:
    """Those of the numbers that are this process's to work on."""
    return [number for number in numbers if number % n_processes() == rank()]
