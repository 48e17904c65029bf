"""What a run computes with: model and optimizer, accelerate, and weights sharded by PyTorch's `fully_shard`."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retro import parallel
from retro.config import RetrofitConfig
from retro.errors import InvalidOption
from retro.loss import cross_entropy
from retro.retrofit import Model
from retro.runs.checkpoints import (
    Progress,
    copy_checkpoint,
    load_optimizer,
    load_weights,
    newest_whole_checkpoint,
    remove_earlier,
    set_aside_after,
)
from retro.runs.models import seeded_model
from retro.runs.optimizers import new_optimizer, require_muon
from retro.runs.run import Run


class Engine(NamedTuple):
    """A model and its optimizer, where a run begins or goes on."""

    model: Model
    net: Any  # the model, or what averages gradients around it
    optimizer: Any
    accelerator: Accelerator
    progress: Progress


def new_engine(device: torch.device, model: Model, optimizer: Any) -> Engine:
    """An engine at its first step."""
    accelerator = new_accelerator(device, model)
    return Engine(model, accelerator.prepare_model(model, device_placement=False), optimizer, accelerator, Progress())


def nats_of(model: Model, net: Any, inputs: list[Any], targets: Tensor) -> Tensor:
    """Sum of the cross entropies of `targets` (B, T), in nats, of a model that is called as `net`.

    One that is called with tokens and neighbors alone, as the tutorial's own is, gives all of its logits.
    """
    if "targets" in signature(model.forward).parameters:
        return net(*inputs, targets=targets)
    return cross_entropy(net(*inputs).flatten(0, 1), targets.flatten())


def require_fits(run: Run, fsdp: bool) -> None:
    """Raise `InvalidOption` for what does not go together, and `ValueError` for fsdp in a single process.

    It is asked before there is anything of the run.
    """
    config, shape = run.config, run.shape
    if isinstance(shape, RetrofitConfig) and (fsdp or config.compile or config.recompute):
        raise InvalidOption("base", shape.base, "is read through hooks, which fsdp, compile and recompute do not take")
    if config.optimizer == "muon":
        require_muon(isinstance(shape, RetrofitConfig))
    if not fsdp:
        return
    if parallel.n_processes() < 2:
        raise ValueError("fsdp shards a model over processes; start several: torchrun --nproc-per-node N")
    if config.optimizer == "muon":
        reason = "needs whole matrices, of which fsdp gives each process rows"
        raise InvalidOption("optimizer", config.optimizer, reason)
    if config.micro_batch is not None:  # weights are gathered in each part, of which a process may have fewer
        raise InvalidOption("micro_batch", config.micro_batch, "does not go with fsdp, whose processes step together")


def start_engine(run: Run, device: torch.device, fsdp: bool) -> Engine:
    """A new model, or that of the run's last checkpoint, on its device."""
    config = run.config
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    model = run.model if run.model is not None else seeded_model(run.shape, config.seed, device)
    if (saved := _checkpoint_to_go_on_from(run)) is not None:
        load_weights(saved, model)
    if not fsdp:  # which puts on the device what is its own
        model.to(device)
    accelerator = new_accelerator(device, model)
    if fsdp:
        shard_model(model, device, config.precision)
    if config.recompute:
        for layer in layers_of(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if config.compile:
        model.compile()
    optimizer = new_optimizer(model, config, fused=device.type in ("cuda", "cpu"))
    progress = load_optimizer(saved, optimizer) if saved is not None else Progress()
    if run.continues and progress.step == run.continues.step:
        progress.seconds, progress.tokens = 0.0, 0  # those of the other run
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    net = model if fsdp else accelerator.prepare_model(model, device_placement=False)
    return Engine(model, net, optimizer, accelerator, progress)


def _checkpoint_to_go_on_from(run: Run) -> Path | None:
    """The newest whole checkpoint of a run, else that of the run which it goes on from; None where it begins."""
    found = newest_whole_checkpoint(run.folder)
    set_aside_after(run.folder, -1 if found is None else int(found.name))
    if found is not None:  # who wrote it may have been killed before it removed others
        step = int(found.name)
        parallel.on_rank_zero(lambda: remove_earlier(run.folder, step, run.interval))
    if found is None and run.continues and run.origin:
        found = copy_checkpoint(run.origin / "checkpoints" / f"{run.continues.step:08d}", run.folder)
    return found


def new_accelerator(device: torch.device, model: Model) -> Accelerator:
    """accelerate's engine for a model; a model without cross-attention has weights that no step uses."""
    forget_other_device(device)
    unused = DistributedDataParallelKwargs(find_unused_parameters=not model.ca_layers)
    handlers = [unused, InitProcessGroupKwargs(timeout=parallel.PATIENCE)]
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=handlers)


def forget_other_device(device: torch.device) -> None:
    """Let accelerate begin anew in a process that has trained on another kind of device, which it would not leave.

    It keeps one state for all of a process. Of several processes that is the group that they have joined, and it stays;
    in a single one nothing that an earlier trainer asks of it depends on the device.
    """
    known = PartialState._shared_state.get("device")
    if parallel.n_processes() == 1 and known is not None and known.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)


def shard_model(model: Any, device: torch.device, precision: str) -> None:
    """Shard the weights over the processes, rows by rows; each module gathers its own while it computes.

    In `bf16` those of layers are gathered in 16 bits, which is what autocast would make of them; the states that layers
    add to stay in 32, as do norms, embeddings, what the optimizer has, and sums of gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (parallel.n_processes(),))

    def policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        """Autocast rounds what modules are given, where it should; rotations and distances it leaves in 32 bits."""
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.RMSNorm):  # which are of states
            fully_shard(module, mesh=mesh, mp_policy=policy(None))
    for module in layers_of(model):
        fully_shard(module, mesh=mesh, mp_policy=policy(torch.bfloat16 if precision == "bf16" else None))
    fully_shard(model, mesh=mesh, mp_policy=policy(None))


def layers_of(model: Any) -> list[Any]:
    """The layers of a `RetroModel`; its encoder counts as one."""
    return [*model.attn, *model.ffw, *model.cca, *([model.encoder] if model.encoder is not None else [])]
