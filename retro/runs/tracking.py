"""Watching a run: labml records its figures, a line on the screen tells how far it is, Ctrl-C ends it after a step."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from labml import experiment, lab, tracker

from retro import parallel
from retro.config import TrainConfig
from retro.errors import InvalidOption
from retro.progress import each, note
from retro.runs.curves import LEARNING_RATE, SPEED
from retro.runs.run import Run
from retro.storage.files import exclusive_lock

TRACKERS = ("tensorboard", "wandb", "trackio")  # of accelerate, whose others are told a run's name in ways of their own
_also: list[GeneralTracker] = []  # accelerate's trackers of the run that is trained now


@contextlib.contextmanager
def tracked(run: Run, data_path: Path) -> Iterator[None]:
    """Inside, labml's tracker writes to the run's folder, and no other command trains the run."""
    if parallel.rank():
        yield
        return
    folder = run.folder
    pid_file = folder / "run.pid"  # labml's, which stops where one was left; the lock is what counts here
    with exclusive_lock(folder):
        pid_file.unlink(missing_ok=True)
        _let_labml_show_in_notebooks()
        name, experiments = folder.resolve().parent.name, folder.resolve().parent.parent
        with contextlib.redirect_stdout(io.StringIO()):  # labml remarks on a missing .labml.yaml and repository
            lab.configure(
                {"path": str(Path.cwd()), "data_path": str(data_path.resolve()), "experiments_path": str(experiments)}
            )
            experiment.create(name=name, uuid=folder.name, comment=name, writers={"file"})
        experiment.configs(asdict(run.config))
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.redirect_stdout(io.StringIO()):  # a banner
                    stack.enter_context(experiment.start())
                yield
        finally:
            pid_file.unlink(missing_ok=True)
            for thread in threading.enumerate():
                if type(thread).__name__ == "FileWriterThread":  # labml's, which has been told to end
                    thread.join()


def _let_labml_show_in_notebooks() -> None:
    """labml 0.5 looks for IPython's `display` where IPython 9 has it no more: no run could be trained in a notebook."""
    if "IPython" in sys.modules:  # which is nothing that this library needs
        former = importlib.import_module("IPython.core.display")
        if not hasattr(former, "display"):
            former.display = importlib.import_module("IPython.display").display  # type: ignore[attr-defined]


def require_trackers(names: Sequence[str]) -> None:
    """Raise `InvalidOption` for the name of a tracker that accelerate does not know, or whose package is missing."""
    for name in names:
        own = [known for known in LOGGER_TYPE_TO_CLASS if known not in LoggerType]  # that someone has registered
        if name not in (*TRACKERS, *own):
            raise InvalidOption("log", name, f"is not one of {', '.join((*TRACKERS, *own))}")
        if name in TRACKERS and name not in map(str, get_available_trackers()):
            raise InvalidOption("log", name, f"is not installed: pip install {name}")


@contextlib.contextmanager
def recorded_by(names: Sequence[str], run: Run) -> Iterator[None]:
    """Inside, accelerate's trackers of these names are told what labml's is; files are in the run's folder."""
    try:
        for name in names if not parallel.rank() else ():
            kind = LOGGER_TYPE_TO_CLASS[name]
            if kind.requires_logging_directory:
                also = kind(run_name=name, logging_dir=run.folder)
            else:
                also = kind(run_name=run.folder.parent.name, name=run.folder.name)
            also.start()
            _also.append(also)
        yield
    finally:
        while _also:
            _also.pop().finish()


def _tell(values: Mapping[str, float], step: int) -> None:
    for also in _also:
        also.log(dict(values), step=step)


def steps(dataloader: Iterable[Any]) -> Iterable[Any]:
    """The batches of an interval, with a bar beside them."""
    return each(dataloader, "Train", "step")


def record(loss: torch.Tensor, step: int, n_samples: torch.Tensor, n_recorded: int) -> int:
    """Record the loss of a step; every tenth time it is written, because reading it waits for the device.

    * `n_samples` are those of the trainer's call so far, of which `n_recorded` are counted in labml's step

    Returns how many are counted now.
    """
    tracker.add("loss.train", loss)
    if step % 10 == 0:
        n_recorded = record_samples(n_samples, n_recorded)
        tracker.save()
        if _also:
            _tell({"loss.train": float(loss)}, step)
    return n_recorded


def record_samples(n_samples: torch.Tensor, n_recorded: int) -> int:
    """Count those of `n_samples` in labml's step that are not yet; returns how many are counted now."""
    n = int(n_samples)
    tracker.add_global_step(n - n_recorded)
    return n


class InterruptedInStep(KeyboardInterrupt):
    """Ctrl-C, pressed twice: what the step has changed is neither old nor new."""


@contextlib.contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end, so that a step is made whole.

    Pressed twice, it does not, and raises `InterruptedInStep`.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # Ctrl-C is someone else's
        return
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise InterruptedInStep
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def report_origin(run: Run, d_model: int, learning_rate: Callable[[int, int, TrainConfig, int], float]) -> None:
    """Say which run this one goes on from, if any, and the learning rates of both where the length changes them.

    * `learning_rate` is that of a step in a run of so many steps, of a model of this width
    """
    if run.continues is None or parallel.rank():
        return
    step, before, config = run.first_step, run.continues.n_steps, run.config
    note(f"{run.folder} goes on from step {step:,} of {run.origin}, which stays as it is")
    first = learning_rate(step, run.n_steps, config, d_model)
    if first != learning_rate(step, before, config, d_model):
        last = learning_rate(step - 1, before, config, d_model)
        note(f"note: the learning rate was {last:.3g} there, and is {first:.3g} in a run of {run.n_steps:,} steps")


def report_progress(
    step: int, n_steps: int, losses: Mapping[str, float], tokens_per_second: float, left: float, learning_rate: float
) -> None:
    """Record losses, in bits per byte, speed and learning rate, and say how far training is, in a line.

    * `left` are seconds
    """
    if parallel.rank():
        return
    values = {f"bpb.{name}": value for name, value in losses.items()}
    values |= {LEARNING_RATE: learning_rate, SPEED: tokens_per_second}
    tracker.save(values)
    _tell(values, step)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    minutes = f"{left / 60:.0f} min" if left >= 120 else f"{left:.0f} s"
    note(f"step {step:,} of {n_steps:,}: {figures} bits per byte; {tokens_per_second:,.0f} tokens/s, {minutes} left")
