"""What takes the steps of training: Adam, as in the tutorial, or Muon for matrices and Adam for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from retro.config import TrainConfig
from retro.errors import InvalidOption
from retro.model import RetroModel
from retro.retrofit import Model, Retrofit


def new_optimizer(model: Model, config: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW over what a model trains; without weight decay it is Adam, as in the tutorial. Or Muon, and it.

    Raises `InvalidOption` for Muon where there is a base, or torch has none.
    """
    if config.optimizer == "muon":
        return MuonAndAdam(model, config, fused)
    groups = model.parameter_groups() if isinstance(model, Retrofit) else [{"params": [*model.parameters()]}]
    return _adam(_by_decay(model, groups, config), config, fused)


def require_muon(has_base: bool) -> None:
    """Raise `InvalidOption` where there is a base, or torch has no Muon."""
    if has_base:
        raise InvalidOption("optimizer", "muon", "is for models that are trained from nothing")
    if not hasattr(torch.optim, "Muon"):
        raise InvalidOption("optimizer", "muon", f"needs torch 2.9, but this is {torch.__version__}")


def _adam(groups: list[dict[str, Any]], config: TrainConfig, fused: bool) -> torch.optim.AdamW:
    betas, own = (0.9, config.beta2), [group for group in groups if group["params"]]
    return torch.optim.AdamW(own, lr=config.lr, betas=betas, eps=1e-9, weight_decay=0.0, fused=fused)


def _by_decay(model: Model, groups: list[dict[str, Any]], config: TrainConfig) -> list[dict[str, Any]]:
    """The groups, each as one whose weights decay and one of the others, if any do."""
    if not config.weight_decay:
        return groups
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}

    def decays(weight: torch.nn.Parameter) -> bool:
        return weight.dim() > 1 and id(weight) not in embeddings

    return [
        {
            **group,
            "params": [weight for weight in group["params"] if decays(weight) == of],
            "weight_decay": config.weight_decay * of,
        }
        for group in groups
        for of in (True, False)
    ]


class MuonAndAdam(torch.optim.Optimizer):
    """Muon for the matrices inside a `RetroModel`, AdamW for embeddings, the last layer, norms and biases.

    Muon takes a step along the nearest orthogonal matrix to the mean of gradients, here of the size that Adam's would
    have (`match_rms_adamw`, arXiv:2502.16982), so that both have the same learning rate and weight decay.
    """

    def __init__(self, model: Model, config: TrainConfig, fused: bool) -> None:
        require_muon(not isinstance(model, RetroModel))
        inside = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.read]
        matrices = {id(linear.weight): linear.weight for linear in inside}
        others = [weight for weight in model.parameters() if id(weight) not in matrices]
        self._muon = torch.optim.Muon(
            matrices.values(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adam = _adam(_by_decay(model, [{"params": others}], config), config, fused)
        super().__init__([*self._muon.param_groups, *self._adam.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state that this one shows, saves and loads."""
        self._muon.param_groups, self._adam.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adam.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict()` gave, of both."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """A step of both; `closure` is there because optimizers take one, and is not called."""
        self._muon.step()
        self._adam.step()
