r"""Training: the loop, its checkpoints, and the script that does the main job.

The loss is the mean cross entropy of the next token, in nats. It is reported as bits per byte
(section 4.1 of arXiv:2112.04426), which does not depend on the tokenizer:

$$\text{bpb} = \frac{\text{nats per token}}{\ln 2 \cdot \text{bytes per token}}$$

A run's folder is named by a hash of everything that shapes the run. The same command therefore
finds its own run again: finished, it is reported; interrupted, it continues from its last
checkpoint, with the same numbers as if it had never stopped. For that, the data order is a function
of the seed and the step, the learning rate of the step alone, and the rest is in the checkpoint.

Under `torchrun` the samples of a step are shared out, so that two processes make the steps of one, each with half
of the batch. Hugging Face accelerate is the engine: its DDP keeps a copy of the model in each process; with
`fsdp` each process keeps a part of every weight (PyTorch's `fully_shard`), and of each checkpoint.

The defaults of `TrainConfig` are the tutorial's: batches of 4 samples, 32 epochs, Adam with Noam's schedule.
What it lacks: validation on held-out documents, checkpoints, gradient clipping, bf16, and any device
but the first GPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.commands import train_command

    raise SystemExit(train_command())

import contextlib
import io
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from labml import experiment, lab, logger, monit, tracker
from labml.logger import Text
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Sampler as TorchSampler

from retro import distributed
from retro.artifacts import (
    FORMAT_VERSION,
    TEMPORARY,
    Fields,
    differences,
    only_writer,
    package_versions,
    read_json,
    require_fields,
    require_match,
    sha256_of_file,
    sha256_of_json,
    write_json,
)
from retro.corpus import NO_TOKEN
from retro.database import RetroIndex, open_corpus, read_manifest
from retro.dataset import DATASET_FILE, HEADER_FIELDS, IGNORED_TARGET, REPAIR, Dataset
from retro.device import pick_device
from retro.model import NearestNeighborEncoder, RetroConfig, RetroModel, config_of, write_config
from retro.sample import Sampler
from retro.weights import load_tensors, newest_checkpoint, save_tensors, spread_like, verify_checkpoint

PROMPT = "Second Citizen:\nOne word, good citizens.\n\nFirst Citizen:"  # the tutorial's


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the tutorial's."""

    batch_size: int = 4  # samples
    epochs: int | None = 32
    steps: int | None = None  # in place of epochs
    lr: float = 1.0  # a factor for `noam`, the peak for `cosine`
    schedule: str = "noam"  # or "cosine": linear warm-up, then down to a tenth
    warmup: int = 2000  # steps
    clip: float | None = None  # largest norm of the gradient
    precision: str = "fp32"  # or "bf16": autocast
    compile: bool = False  # by torch.compile, which takes a minute or two to begin with
    interval: int | None = None  # steps between validations and checkpoints; an epoch if None
    n_valid_batches: int = 16  # of an interim validation; the last one takes all
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs={self.epochs} and steps={self.steps}: give one of the two")
        for name, value, known in (
            ("schedule", self.schedule, ("noam", "cosine")),
            ("precision", self.precision, ("fp32", "bf16")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        for name in ("batch_size", "epochs", "steps", "warmup", "interval"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} is not at least 1")


def learning_rate(step: int, n_steps: int, config: TrainConfig, d_model: int) -> float:
    r"""Learning rate of a step, counted from 0.

    `noam` is the tutorial's (section 5.3 of arXiv:1706.03762), with $t$ the step counted from 1 and $w$ the
    warm-up: $\text{lr} \cdot d_{model}^{-1/2} \min(t^{-1/2}, t \, w^{-3/2})$.
    """
    t, w = step + 1, config.warmup
    if config.schedule == "noam":
        return config.lr * d_model**-0.5 * min(t**-0.5, t * w**-1.5)
    if t <= w:
        return config.lr * t / w
    done = (t - w) / max(1, n_steps - w)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


class Batches(TorchSampler):
    """Numbers of the samples of each step, from `start` to `stop`; each epoch is a new seeded permutation.

    Of several processes each gets its share of each step's samples, which may be none.
    """

    def __init__(self, n_samples: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        self.n_samples, self.batch_size, self.seed, self.start, self.stop = n_samples, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, drawn = math.ceil(self.n_samples / self.batch_size), -1
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, per_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng([self.seed, epoch]).permutation(self.n_samples).tolist(), epoch
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield batch[distributed.rank() :: distributed.n_processes()]


def collate(items: list[tuple[torch.Tensor, ...]], blank: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """A batch of samples; of none, the `blank` one, in which there is nothing to predict."""
    return default_collate(items or [blank])


class Trainer:
    """Trains a model; the first arguments are the tutorial's.

    * `device` is the device of the model
    * `model` is the model
    * `dataloader` gives batches `(src, tgt, neighbors)`
    * `optimizer` is the optimizer
    * `clip` is the largest norm of the gradient, None for any
    * `precision` is `fp32`, or `bf16` for autocast
    * `lr_of_step` gives the learning rate of a step; left out, the optimizer's stays
    * `step` is the number of the first step
    * `accelerator` is accelerate's engine; left out, one is made for `device`
    * `sharded` tells that the model's weights are spread over the processes already
    """

    def __init__(
        self,
        device: torch.device | str,
        model: RetroModel,
        dataloader: DataLoader,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        precision: str = "fp32",
        lr_of_step: Any = None,
        step: int = 0,
        accelerator: Accelerator | None = None,
        sharded: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model
        self.dataloader = dataloader
        self.optimizer = optimizer
        self.clip = clip
        self.precision = precision
        self.lr_of_step = lr_of_step
        self.step = step
        self.accelerator = accelerator or new_accelerator(self.device, model)
        # What is called in place of the model: with several processes it averages their gradients.
        self.net = model if sharded else self.accelerator.prepare_model(model, device_placement=False)

    def __call__(self) -> float:
        """Train on every batch of the dataloader; returns the mean loss, in nats per token."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for _, batch in monit.enum("Train", self.dataloader):
            loss = self.train_step(*batch)
            total += loss
            tracker.add("loss.train", loss)
            tracker.add_global_step(len(batch[0]))
            if self.step % 10 == 0:  # reading the loss waits for the device
                tracker.save()
        return total.item() / max(1, len(self.dataloader))

    def train_step(self, src: torch.Tensor, tgt: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
        """One step of the optimizer; returns the loss over all processes, on the device."""
        if self.lr_of_step is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr_of_step(self.step)
        loss = self.loss(src, tgt, neighbors)
        self.optimizer.zero_grad()
        if self.accelerator.num_processes > 1:
            n = (tgt >= 0).sum().to(loss)
            total, n_total = self.accelerator.reduce(torch.stack([loss.detach() * n, n]))
            # Gradients are averaged over processes; weighted by its targets each counts as much as it should.
            self.accelerator.backward(loss * (n * self.accelerator.num_processes / n_total))
            loss = total / n_total
        else:
            self.accelerator.backward(loss)
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def loss(self, src: torch.Tensor, tgt: torch.Tensor, neighbors: torch.Tensor | None) -> torch.Tensor:
        """Mean cross entropy of a batch, in nats per token; 0 where there is nothing to predict."""
        src, tgt = (x.to(self.device, non_blocking=True) for x in (src, tgt))
        if neighbors is not None:
            neighbors = neighbors.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.net(src, neighbors)
        total = F.cross_entropy(logits.float().flatten(0, 1), tgt.flatten(), reduction="sum")
        return total / (tgt >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def validate(self, dataloader: DataLoader, retrieval: bool = True) -> float:
        """Mean loss over a dataloader, in nats per token; without retrieval no neighbor is read."""
        self.model.eval()
        total, n = 0.0, 0
        for src, tgt, neighbors in dataloader:
            n_targets = int((tgt >= 0).sum())
            total += self.loss(src, tgt, neighbors if retrieval else None).item() * n_targets
            n += n_targets
        sums = self.accelerator.reduce(torch.tensor([total, n], device=self.device, dtype=torch.float64))
        return (sums[0] / sums[1]).item()


def shard_model(model: RetroModel, device: torch.device) -> None:
    """Spread the weights over the processes, rows by rows; each module gathers its own while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if distributed.n_processes() < 2:
        raise ValueError(
            "--fsdp spreads a model over processes; start several: torchrun --nproc-per-node N -m retro.train"
        )
    mesh = init_device_mesh(device.type, (distributed.n_processes(),))
    layers = [*model.attn, *model.ffw, *model.cca, *([model.encoder] if model.encoder is not None else [])]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)


def new_accelerator(device: torch.device, model: RetroModel) -> Accelerator:
    """accelerate's engine for a model; a model without cross-attention has weights that no step uses."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=not model.ca_layers)
    handlers = [unused, InitProcessGroupKwargs(timeout=distributed.PATIENCE)]
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers)


def train(
    *,
    data_path: str | Path = "data",
    name: str = "retro_small",
    config: TrainConfig | None = None,
    model_shape: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    prompt: str = PROMPT,
    resume: str | Path | None = None,
    fsdp: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Train a model on the dataset in `data_path`; without arguments, as the tutorial does.

    * `name` is the experiment; runs lie in `logs/NAME/`
    * `config` says how to train, `model_shape` what: values of `RetroConfig`, whose vocabulary and
      `chunk_len` come from the data
    * `device` is where; left out, the best there is
    * `prompt` is continued after each interval, to watch the model learn
    * `resume` is the folder of a run to continue; its own configs are then used, with the steps
      or epochs of `config` if it is given
    * `fsdp` spreads the weights over the processes of `torchrun`, for models that do not fit one

    Returns the run's folder and its summary: steps, bits per byte, tokens per second. Calling
    it again with the same arguments continues the same run, or returns the finished one.
    """
    data_path, device = Path(data_path), torch.device(device) if device else pick_device()
    if distributed.n_processes() > 1:
        distributed.join(device)
    corpus = open_corpus(data_path)
    datasets = {split: Dataset(data_path / file, corpus) for split, file in DATASET_FILE.items()}
    header = datasets["train"].header
    if resume is None:
        index_now = read_manifest(data_path)["index_sha256"]
        require_match(datasets["train"].path, header, {"index_sha256": index_now}, f"{REPAIR} --data-path {data_path}")
        config = config or TrainConfig()
        shape = {"n_vocab": corpus.n_tokens, "chunk_len": header["chunk_len"], **(model_shape or {})}
        made_with = {
            "train": asdict(config),
            "model": asdict(RetroConfig(**shape)),
            "dataset": {k: v for k, v in header.items() if k != "versions"},
        }
        run = Path("logs") / name / sha256_of_json(made_with)[:16]
    else:
        run = Path(resume)
        made_with = read_run(run)
        saved = TrainConfig(**made_with["train"])
        config = replace(saved, steps=config.steps, epochs=config.epochs) if config else saved
        if different := differences(header, made_with["dataset"]):
            raise ValueError(
                f"{run} was trained on another dataset ({data_path} has {'; '.join(different)}); name the folder of "
                f"its data with --data-path, or build it again with these options: {REPAIR}"
            )
        made_with["train"] = asdict(config)
    model_config = config_of(made_with["model"])
    n_steps = config.steps or config.epochs * math.ceil(len(datasets["train"]) / config.batch_size)  # type: ignore[operator]
    if (finished := _finished(run, n_steps)) is not None:
        return run, finished
    with _tracked(name, run, config, data_path):
        distributed.first(
            lambda: write_json(
                run / "run.json",
                {
                    "format_version": FORMAT_VERSION,
                    **{k: made_with[k] for k in ("train", "model", "dataset")},
                    "data_path": str(data_path),
                    "versions": package_versions(),
                },
            )
        )
        return run, _train(run, config, model_config, datasets, corpus, device, n_steps, prompt, data_path, fsdp)


def _train(
    run: Path,
    config: TrainConfig,
    model_config: RetroConfig,
    datasets: dict[str, Dataset],
    corpus: Any,
    device: torch.device,
    n_steps: int,
    prompt: str,
    data_path: Path,
    fsdp: bool,
) -> dict[str, Any]:
    """The loop of `train`: intervals of training, each ended by a validation, a sample and a checkpoint."""
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    model = RetroModel.from_config(model_config)
    found = distributed.first(lambda: newest_whole_checkpoint(run))
    folder = found or (newest_whole_checkpoint(run) if distributed.rank() else None)
    if folder is not None:
        model.load_state_dict(RetroModel.load(folder).state_dict())
    if not fsdp:  # which puts on the device what is its own
        model.to(device)
    accelerator = new_accelerator(device, model)
    if fsdp:
        shard_model(model, device)
    if config.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, eps=1e-9, fused=device.type in ("cuda", "cpu"))
    step, seconds, train_loss = load_optimizer(folder, optimizer) if folder is not None else (0, 0.0, math.nan)
    m, K = model_config.chunk_len, datasets["train"].header["n_neighbors"]
    sampler = None
    if distributed.rank() == 0 and not fsdp:
        index = RetroIndex(m, n_neighbors=K, corpus=corpus, data_path=data_path, device=device)
        sampler = Sampler(device, model, corpus, m, index=index)
    length = m * datasets["train"].header["chunks_per_sample"]
    blank = (
        torch.zeros(length, dtype=torch.long),
        torch.full((length,), IGNORED_TARGET),
        torch.full((length // m, K, 2 * m), NO_TOKEN),
    )

    def loader(split: str, start: int, stop: int) -> DataLoader:
        batches = Batches(len(datasets[split]), config.batch_size, config.seed, start, stop)
        return DataLoader(
            datasets[split],
            batch_sampler=batches,
            pin_memory=device.type == "cuda",
            collate_fn=partial(collate, blank=blank),
        )

    n_valid = math.ceil(len(datasets["valid"]) / config.batch_size)
    trainer = Trainer(
        device,
        model,
        loader("train", 0, 0),
        accelerator.prepare_optimizer(optimizer, device_placement=False),
        clip=config.clip,
        precision=config.precision,
        lr_of_step=lambda step: learning_rate(step, n_steps, config, model_config.d_model),
        step=step,
        accelerator=accelerator,
        sharded=fsdp,
    )
    interval = config.interval or math.ceil(len(datasets["train"]) / config.batch_size)
    bits = {split: 1 / (math.log(2) * corpus.bytes_per_token(split)) for split in datasets}
    tracker.set_global_step(step * config.batch_size)
    while trainer.step < n_steps:
        trainer.dataloader = loader("train", trainer.step, min(n_steps, trainer.step + interval))
        started = time.perf_counter()
        train_loss = trainer()
        seconds += time.perf_counter() - started
        valid_loss = trainer.validate(loader("valid", 0, min(n_valid, config.n_valid_batches)))
        tracker.save({"bpb.train": train_loss * bits["train"], "bpb.valid": valid_loss * bits["valid"]})
        tracker.new_line()
        if sampler is not None:
            try:
                logger.log([(prompt, Text.subtle), (sampler.sample(prompt, 8 * m), Text.none)])
            except ValueError as error:  # a prompt that this vocabulary cannot write is no reason to stop
                logger.log(f"no sample: {error}", Text.warning)
        save_checkpoint(run, model, model_config, optimizer, trainer.step, seconds, train_loss)

    n_tokens = trainer.step * config.batch_size * length
    with monit.section("Validate"):
        whole = loader("valid", 0, n_valid)
        on, off = trainer.validate(whole), trainer.validate(whole, retrieval=False)
    summary = {
        "format_version": FORMAT_VERSION,
        "steps": trainer.step,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "train_bpb": round(train_loss * bits["train"], 4),
        "valid_bpb": round(on * bits["valid"], 4),
        "valid_bpb_without_retrieval": round(off * bits["valid"], 4),
        "tokens_per_second": round(n_tokens / seconds, 1),
        "device": device.type,
    }
    distributed.first(lambda: write_json(run / "summary.json", summary))
    return summary


RUN_FIELDS: Fields = {"train": dict, "model": dict, "dataset": dict, "data_path": str}


def read_run(run: Path, repair: str = "python -m retro.train") -> dict[str, Any]:
    """A run's `run.json`: what made it. Raises if it is missing or damaged."""
    path = run / "run.json"
    made_with = read_json(path, repair, RUN_FIELDS)
    require_fields(path, made_with["dataset"], HEADER_FIELDS, repair)
    try:
        TrainConfig(**made_with["train"])
        config_of(made_with["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no run ({error}). Train anew: {repair}") from None
    return made_with


SUMMARY_FIELDS: Fields = {
    "steps": int,
    "n_parameters": int,
    "train_bpb": float,
    "valid_bpb": float,
    "valid_bpb_without_retrieval": float,
    "tokens_per_second": float,
    "device": str,
}


def _finished(run: Path, n_steps: int) -> dict[str, Any] | None:
    """The summary of a run that has already made its steps."""
    if not (run / "summary.json").exists():
        return None
    repair = f"rm {run / 'summary.json'}; python -m retro.train --resume {run}"
    summary = read_json(run / "summary.json", repair, SUMMARY_FIELDS)
    return summary if summary["steps"] >= n_steps else None


@contextlib.contextmanager
def _tracked(name: str, run: Path, config: TrainConfig, data_path: Path) -> Iterator[None]:
    """Inside, labml's tracker writes to the run's folder and the screen, and no other process trains the run."""
    if distributed.rank():
        yield
        return
    pid_file = run / "run.pid"  # labml's, which stops where one was left; the lock is what counts here
    with only_writer(run):
        pid_file.unlink(missing_ok=True)
        experiments = run.resolve().parent.parent
        with contextlib.redirect_stdout(io.StringIO()):  # labml remarks on a missing .labml.yaml and repository
            lab.configure(
                {"path": str(Path.cwd()), "data_path": str(data_path.resolve()), "experiments_path": str(experiments)}
            )
            experiment.create(name=run.resolve().parent.name, uuid=run.name, comment=name, writers={"screen", "file"})
        experiment.configs(asdict(config))
        try:
            with experiment.start():
                yield
        finally:
            pid_file.unlink(missing_ok=True)


def save_checkpoint(
    run: Path,
    model: RetroModel,
    model_config: RetroConfig,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    train_loss: float,
) -> None:
    """Write `checkpoints/STEP`, whole or not at all; of the earlier ones the last is kept.

    Where the weights are spread over processes, each writes its own part, and the first one the rest.
    """
    folder = run / "checkpoints" / f"{step:08d}"
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")

    def clear() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    try:
        distributed.first(clear)
        tensors = {"rng": torch.get_rng_state()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{key}": value for key, value in state.items()}
        save_tensors(temporary, "model", model.state_dict())
        save_tensors(temporary, "optimizer", tensors)
        distributed.wait()
        if distributed.rank():
            return
        write_config(temporary, model_config)
        hashes = {file.name: sha256_of_file(file) for file in sorted(temporary.iterdir())}
        state = {"format_version": FORMAT_VERSION, "step": step, "seconds": seconds, "train_loss": train_loss}
        write_json(temporary / "state.json", state | {"files": hashes})
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except Exception as error:  # safetensors raises its own kind for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"cannot write {folder}: {error}. Earlier checkpoints are intact; continue with --resume {run}"
        ) from error
    for old in sorted((run / "checkpoints").glob("[0-9]*"))[:-2]:
        shutil.rmtree(old)


def newest_whole_checkpoint(run: Path) -> Path | None:
    """A run's newest checkpoint that is as it was written, None without one; damaged ones are named and removed."""
    while True:
        try:
            folder = newest_checkpoint(run)
        except FileNotFoundError:
            return None
        try:
            verify_checkpoint(folder)
            return folder
        except (ValueError, FileNotFoundError) as error:
            logger.log(f"{error} It is passed over.", Text.warning)
            shutil.rmtree(folder)


STATE_FIELDS: Fields = {"step": int, "seconds": float, "train_loss": float, "files": dict}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> tuple[int, float, float]:
    """Take up the optimizer of a checkpoint; returns step, seconds trained, last training loss."""
    repair = f"delete {folder} to fall back to an older checkpoint"
    state = read_json(folder / "state.json", repair, STATE_FIELDS)
    tensors = load_tensors(folder, "optimizer")
    saved, parameters = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {}
    try:
        torch.set_rng_state(tensors.pop("rng"))
        for name, tensor in tensors.items():
            number, key = name.split(".")
            values = saved["state"].setdefault(int(number), {})
            values[key] = spread_like(parameters[int(number)], tensor)
        optimizer.load_state_dict(saved)
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} holds no optimizer of this model ({error}); {repair}") from None
    return state["step"], state["seconds"], state["train_loss"]


__all__ = ["NearestNeighborEncoder", "RetroModel", "Sampler", "TrainConfig", "Trainer", "train"]
