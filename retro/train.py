r"""Training: the loop, resumed wherever it was stopped.

The loss is the mean cross entropy of the next token, in nats. It is reported as bits per byte (section 4.1 of
arXiv:2112.04426), which does not depend on the tokenizer:

$$\text{bpb} = \frac{\text{nats per token}}{\ln 2 \cdot \text{bytes per token}}$$

The same command finds its own run again: finished, it is reported; interrupted, it continues from its last checkpoint,
with the same numbers as if it had never stopped. For that, the order of the samples and the learning rate are functions
of the seed and the step, and the rest is in the checkpoint. Under `torchrun` the samples of a step are shared out, so
that two processes make the steps of one.

The defaults of `TrainConfig` are the tutorial's: batches of 4 samples, 32 epochs, Adam with Noam's schedule. What it
lacks: validation on held-out documents, checkpoints, gradient clipping, bf16, and any device but the first GPU.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from retro.config import TrainConfig
from retro.device import pick_device
from retro.retrofit import Model
from retro.runs import curves, data, loop, tracking
from retro.runs.engine import Engine, nats_of, new_engine, require_fits, start_engine
from retro.runs.run import find_run, saved_prompt, write_run
from retro.sample import Sampler

DECAY = 0.2  # of the steps of the schedule `constant`, at the end


class Trainer:
    """Trains a model; the first arguments are the tutorial's.

    * `device` is the device of the model
    * `model` is the model
    * `dataloader` gives batches `(src, tgt, neighbors)`
    * `optimizer` is the optimizer
    * `config` says how: its `clip`, `precision` and schedule; left out, the learning rate is the optimizer's
    * `n_steps` is how many steps there will be, for the schedule
    * `engine` is what a run goes on with; left out, it begins
    """

    def __init__(
        self,
        device: torch.device | str,
        model: Model,
        dataloader: Any,
        optimizer: Any,
        *,
        config: TrainConfig | None = None,
        n_steps: int = 0,
        engine: Engine | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.dataloader = dataloader
        self.optimizer = optimizer
        self.config = config or TrainConfig()
        self.schedules = config is not None
        if self.config.schedule != "noam" and n_steps < 1:
            raise ValueError(
                f"n_steps={n_steps}, but the {self.config.schedule} schedule needs to know how many steps there will be"
            )
        self.n_steps = n_steps
        engine = engine or new_engine(self.device, model, optimizer)
        self.progress, self.accelerator = engine.progress, engine.accelerator
        # Of the model's states, on which Noam's schedule depends.
        self.d_model: int = getattr(model, "d_model", 0) or model.emb.embedding_dim  # type: ignore[assignment, union-attr]
        self.net = engine.net  # called in place of the model: with several processes it averages their gradients

    def __call__(self, closes: bool = True) -> float:
        """Train on every batch of the dataloader; returns the mean loss, in nats per predicted token.

        * `closes`: otherwise the next call goes on with the mean
        """
        self.model.train()
        done, n_recorded = self.progress, 0
        if not done.loss_tokens:
            done.loss_from = done.step
        loss_sum = torch.tensor(done.loss_sum, device=self.device)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # predicted tokens, samples
        try:
            for batch in tracking.steps(self.dataloader):
                with tracking.interrupted_afterwards():
                    sums = self.train_step(*batch)
                    loss_sum += sums[0]
                    counts += sums[1:].long()
                    n_recorded = tracking.record(sums[0] / sums[1], done.step, counts[1], n_recorded)
        finally:
            done.loss_sum = loss_sum.item()
            done.loss_tokens += int(counts[0])
            done.tokens += int(counts[0])
            tracking.record_samples(counts[1], n_recorded)
        mean = done.loss_sum / max(1, done.loss_tokens)
        if closes:
            done.loss_sum, done.loss_tokens = 0.0, 0
        return mean

    def train_step(self, src: torch.Tensor, tgt: torch.Tensor, neighbors: torch.Tensor | None) -> torch.Tensor:
        """One step of the optimizer; returns nats, predicted tokens and samples (3) of all processes, on the device."""
        if self.schedules:
            lr = learning_rate(self.progress.step, self.n_steps, self.config, self.d_model)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)
        tgt = tgt.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        predicted = tgt >= 0
        n_processes = self.accelerator.num_processes
        n, n_samples = predicted.sum(), predicted.any(dim=-1).sum()  # a blank sample has nothing to predict
        counts = torch.stack([n, n_samples]).float()
        if n_processes > 1:
            counts = self.accelerator.reduce(counts)
        nats = counts.new_zeros(1)
        parts = self.parts(src, tgt, neighbors)
        for number, part in enumerate(parts, start=1):
            is_last = number == len(parts)
            # Gradients are averaged over processes, once for a step, and added up over the parts of a step; weighted by
            # its targets each counts as much as it should.
            with nullcontext() if is_last else self.accelerator.no_sync(self.net):
                loss, n = self.loss(*part), (part[1] >= 0).sum()
                self.accelerator.backward(loss * (n * n_processes / counts[0].clamp(min=1)))
            nats += loss.detach() * n
        sums = torch.cat([self.accelerator.reduce(nats) if n_processes > 1 else nats, counts])
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.progress.step += 1
        return sums

    def parts(self, *batch: Any) -> list[list[Any]]:
        """A batch in parts of as many samples as are computed at once; what is None is so in each."""
        size, n = self.config.micro_batch or max(1, len(batch[0])), max(1, len(batch[0]))
        return [[x if x is None else x[start : start + size] for x in batch] for start in range(0, n, size)]

    def loss(self, src: torch.Tensor, tgt: torch.Tensor, neighbors: torch.Tensor | None) -> torch.Tensor:
        """Mean cross entropy of a batch, in nats per token; 0 where there is nothing to predict."""
        tokens, stretches = data.split_stretches(src)
        inputs = [tokens, neighbors] if stretches is None else [tokens, neighbors, stretches]
        inputs = [x if x is None else x.to(self.device, non_blocking=True) for x in inputs]
        tgt = tgt.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            total = nats_of(self.model, self.net, inputs, tgt)
        return total / (tgt >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def validate(self, dataloader: Any, retrieval: bool = True) -> float:
        """Mean loss over a dataloader, in nats per token; without retrieval no neighbor is read."""
        self.model.eval()
        total, n = 0.0, 0
        for src, tgt, neighbors in (part for batch in dataloader for part in self.parts(*batch)):
            n_targets = int((tgt >= 0).sum())
            total += self.loss(src, tgt, neighbors if retrieval else None).item() * n_targets
            n += n_targets
        if self.accelerator.num_processes > 1:  # which never compute on a device without float64, as Apple's GPU is
            sums = torch.tensor([total, n], device=self.device, dtype=torch.float64)
            total, n = self.accelerator.reduce(sums).tolist()
        return total / n


def learning_rate(step: int, n_steps: int, config: TrainConfig, d_model: int) -> float:
    r"""Learning rate of a step, counted from 0.

    `noam` is the tutorial's (section 5.3 of arXiv:1706.03762), with $t$ the step counted from 1 and $w$ the
    warm-up: $\text{lr} \cdot d_{model}^{-1/2} \min(t^{-1/2}, t \, w^{-3/2})$. It is a function and no scheduler of
    torch's, which has a state that a resumed run would have to bring back. `constant` is also known as
    warmup-stable-decay (arXiv:2404.06395): until its last fifth it does not depend on the length.
    """
    t, w = step + 1, config.warmup
    if config.schedule == "noam":
        return config.lr * d_model**-0.5 * min(t**-0.5, t * w**-1.5)
    if t <= w:
        return config.lr * t / w
    if config.schedule == "constant":
        return config.lr * min(1.0, (n_steps - step) / (DECAY * n_steps))
    done = (t - w) / max(1, n_steps - w)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def train(
    *,
    data_path: str | Path = "data",
    name: str | None = None,
    config: TrainConfig | None = None,
    model_shape: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    prompt: str | None = None,
    resume: str | Path | None = None,
    fsdp: bool = False,
    log: tuple[str, ...] = (),
) -> tuple[Path, dict[str, Any]]:
    """Train a model on the dataset in `data_path`; without arguments, as the tutorial does.

    * `name` is the experiment's; runs lie in `logs/NAME/`; left out, the corpus' name, with `_no_retrieval` where
      the model reads no neighbors
    * `config` says how to train, `model_shape` what: values of `RetroConfig`, whose vocabulary and `chunk_len` are the
      data's
    * `device` is where; left out, the best there is
    * `prompt` is continued after each interval, to watch the model learn; left out, the beginning of held-out text
    * `resume` is the folder of a run to continue; its own configs are then used, and of `model_shape` only where its
      `base` is now. If `config` is given and has another length, in `steps` or `epochs`, a run of its own goes on from
      there, in a folder beside it
    * `fsdp` shards the weights over the processes of `torchrun`, for models that do not fit one
    * `log` are trackers of accelerate that are told what labml's is, as `tensorboard`, `wandb`, `trackio`

    Returns the run's folder and its summary: steps, bits per byte, tokens per second. Calling it again with the same
    arguments continues the same run, or returns the finished one.
    """
    device = pick_device(str(device or "auto"))
    found = data.TrainingData(Path(data_path))
    run = find_run(found, name, config, model_shape or {}, Path(resume) if resume else None, device)
    if (finished := run.summary()) is not None:
        return run.folder, finished
    require_fits(run, fsdp)
    beginning = prompt or saved_prompt(run) or found.corpus.beginning_of_held_out(2 * found.chunk_len)
    tracking.require_trackers(log)
    with tracking.tracked(run, found.path), tracking.recorded_by(log, run):
        write_run(run, found, beginning)
        engine = start_engine(run, device, fsdp)
        if engine.progress.step == run.first_step:
            tracking.report_origin(run, engine.model.d_model, learning_rate)
        trainer = Trainer(
            device, engine.model, None, engine.optimizer, config=run.config, n_steps=run.n_steps, engine=engine
        )
        m, K = found.chunk_len, found.header["n_neighbors"]
        sampler = Sampler(device, engine.model, found.corpus, m, data_path=found.path, n_neighbors=K)

        def sample() -> str:
            return beginning + sampler.sample(beginning, 64)

        summary = loop.fit(trainer, run, found, None if fsdp else sample)
    curves.draw(run.folder)
    return run.folder, summary


__all__ = ["Sampler", "TrainConfig", "Trainer", "train"]

if __name__ == "__main__":
    from retro.cli import script

    script("train")
