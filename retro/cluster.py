"""Shards on a Ray cluster: `RAY_ADDRESS=auto retro database TEXT ...`, on machines that have one folder in common.

`torchrun` has as many processes from beginning to end. Ray's come and go: shards are handed out one at a time, to
whoever is free, and one that was lost with its machine is handed out again. What is written is the same, for each shard
is made by the same function, of the same number, as `retro.storage.shards` has it made in one process. What is no map
over shards (learning and filling an index, training) stays where the command was started.

Ray has its address from `RAY_ADDRESS`, as everywhere: `auto` for the cluster that this machine belongs to.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from retro import parallel

T = TypeVar("T")
WAITING = 2  # shards for each core or GPU of the cluster, in work or ready to be
_LOADED: dict[str, Any] = {}  # in a worker: what it does, by a name


def is_there() -> bool:
    """Whether a cluster is to be used. Raises `ValueError` where it is, and Ray is not installed."""
    if not os.environ.get("RAY_ADDRESS") or parallel.n_processes() > 1:
        return False
    try:
        import ray  # noqa: F401
    except ImportError:
        raise ValueError(
            "RAY_ADDRESS is set, but Ray is not installed: pip install 'retro-lm[ray]', or unset RAY_ADDRESS"
        ) from None
    return True


def mapped(work: Callable[[Any], T], items: Iterable[Any], on_gpu: bool = False) -> Iterator[T]:
    """What `work` gives for each item, in their order, computed by the cluster.

    * `work` is sent to each worker once; what it opens lies in a folder that all of them have
    * `on_gpu` gives a GPU to each of them, in the place of a core

    What a worker raises is raised here; what was lost with a worker is computed again.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    name, sent = str(uuid.uuid4()), ray.put(ray.cloudpickle.dumps(work))
    needs: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    task = ray.remote(**needs, max_retries=-1)(_run)
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(task.remote(name, [sent], os.getcwd(), item))
        while len(waiting) >= WAITING * max(1, ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)):
            yield _result_of(waiting.popleft())
    while waiting:
        yield _result_of(waiting.popleft())


def _run(name: str, sent: list[Any], folder: str, item: Any) -> Any:
    """In a worker: load what it does, if it is new to it, and do that with an item."""
    if name not in _LOADED:
        import ray

        os.chdir(folder)
        _LOADED.clear()
        _LOADED[name] = ray.cloudpickle.loads(ray.get(sent[0]))
    return _LOADED[name](item)


def _result_of(task: Any) -> Any:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
