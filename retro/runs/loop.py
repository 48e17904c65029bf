"""The loop of a run: intervals of training, each ended by a checkpoint, a validation and a sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from labml import tracker

from retro import parallel
from retro.progress import note
from retro.runs.checkpoints import save_checkpoint
from retro.runs.data import TrainingData
from retro.runs.run import Run
from retro.runs.tracking import InterruptedInStep, report_progress

FEW_STEPS = 10  # whose time tells how many more to make before a checkpoint


def fit(trainer: Any, run: Run, data: TrainingData, sample: Callable[[], str] | None) -> dict[str, Any]:
    """Train to the end of a run; returns its summary.

    * `trainer` is a `Trainer` of `retro.train`
    * `sample` writes a text, to watch the model learn; None for none

    Ctrl-C ends it after a step, with a checkpoint.
    """
    config, done = run.config, trainer.progress
    pin_memory, n_valid = trainer.device.type == "cuda", data.n_batches("valid", config.batch_size)

    def validate(n_batches: int) -> tuple[float, float]:
        """Bits per byte with and without retrieval."""
        batches = data.batches("valid", config, 0, n_batches, pin_memory)
        on, off = (trainer.validate(batches, retrieval) for retrieval in (True, False))
        bits = data.bits_per_nat("valid", config, 0, n_batches)
        return on * bits, off * bits

    def save() -> None:
        save_checkpoint(run.folder, trainer.model, run.shape, trainer.optimizer, done, run.interval)

    def tokens_per_second() -> float:
        return done.tokens / done.seconds if done.seconds else 0.0

    def steps_between_saves() -> int:
        """As many as lately took `save_minutes`, in the first process; a few where none is measured."""
        if config.save_minutes is None:
            return run.n_steps
        seconds_a_step = done.seconds / max(1, done.step - run.first_step)
        wanted = int(60 * config.save_minutes / seconds_a_step) if seconds_a_step else FEW_STEPS
        return max(1, parallel.broadcast_from_rank_zero(lambda: wanted))

    tracker.set_global_step(data.n_samples_before(done.step, config.batch_size))
    while done.step < run.n_steps or done.loss_tokens:
        # An interval that was stopped at its very last step has no step left, and is closed.
        last = done.step - bool(done.loss_tokens)
        end = min(run.n_steps, (last // run.interval + 1) * run.interval)
        stop = min(end, done.step + steps_between_saves())
        trainer.dataloader = data.batches("train", config, done.step, stop, pin_memory)
        first = done.loss_from if done.loss_tokens else done.step
        started = time.perf_counter()
        try:
            mean = trainer(closes=stop == end)
        except InterruptedInStep:
            raise
        except KeyboardInterrupt:
            if parallel.n_processes() == 1:  # of several, the others may be at another step
                done.seconds += time.perf_counter() - started
                save()
                note(f"step {done.step:,} of {run.n_steps:,}: stopped, with a checkpoint")
            raise
        done.seconds += time.perf_counter() - started
        if stop < end:
            save()
            continue
        done.train_bpb = mean * data.bits_per_nat("train", config, first, end)
        save()
        on, off = validate(min(n_valid, config.n_valid_batches))
        losses = {"train": done.train_bpb, "valid": on, "valid without neighbors": off}
        left = (run.n_steps - done.step) * done.seconds / max(1, done.step - run.first_step)
        lr = trainer.optimizer.param_groups[0]["lr"]
        report_progress(done.step, run.n_steps, losses, tokens_per_second(), left, lr)
        if sample is not None and parallel.rank() == 0:
            note(_one_line(sample))
    on, off = validate(min(n_valid, config.n_final_batches or n_valid))
    summary = {
        "steps": done.step,
        "n_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "n_trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "train_bpb": round(done.train_bpb, 4),
        "valid_bpb": round(on, 4),
        "valid_bpb_without_retrieval": round(off, 4),
        "tokens_per_second": round(tokens_per_second(), 1),
        "device": trainer.device.type,
    }
    run.write_summary(summary)
    return summary


def _one_line(sample: Callable[[], str]) -> str:
    """A sample on one line; whatever keeps it from being written is no reason to stop."""
    try:
        return f"sample: {' '.join(sample().split())}"
    except Exception as error:
        return f"no sample: {error}"
