"""A part that learns: one network with its optimiser, averages and loss scale, and what one step of it does."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from imagewright.shapes import misfit
from imagewright.training.checkpoint import State, load_optimizer_state, optimizer_state, require_fit
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.ema import Ema, averages
from imagewright.types import Trained, UserError


class _State(TypedDict):
    module: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    averages: dict[str, dict[str, Any]]
    scaler: dict[str, float]


class Learner:
    """Backward, gradient exchange, clipping, optimiser step and averages of one `Trained` part."""

    def __init__(self, role: Trained, config: TrainingConfig, device: torch.device) -> None:
        self.module: nn.Module = role.module
        self.config = config
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.lr_scale = role.lr_scale
        self.optimizer = _make_optimizer(self.parameters, config, role.betas)
        self.averages: list[Ema] = averages(self.module, config.ema) if role.ema else []
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients; only this part's parameters receive any."""
        torch.autograd.backward(self.scaler.scale(loss), inputs=self.parameters)

    def restart(self) -> None:
        """Forget the optimiser's moments and its count of steps."""
        self.optimizer.state.clear()

    def step(self, images: int, processes: Processes, factor: float = 1.0) -> dict[str, float]:
        """One optimiser step at `images` images seen (this batch counted). Returns numbers to log, all finite.

        factor: on the learning rate of this step.

        Raises FloatingPointError, before the weights move, when a gradient is not finite (fp16: skips the step).
        """
        batch = self.config.batch
        processes.average_([p.grad for p in self.parameters if p.grad is not None])
        rate = factor * self.lr_scale * self.config.optimizer.lr_at(images, self.config.total_images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.clip_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        numbers = {"lr": rate}
        if self.scaler.is_enabled():  # it leaves out the steps whose scaled gradients overflow; the log counts them
            numbers["overflow"] = float(not math.isfinite(norm))
        elif not math.isfinite(norm):
            raise FloatingPointError("gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.module, images, batch)
        return numbers | ({"grad_norm": norm} if math.isfinite(norm) else {})

    def state(self) -> State:
        """Everything that a resumed run needs, as nested tensors and numbers."""
        return {
            "module": dict(self.module.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self.names),
            "averages": {a.profile.name: a.state for a in self.averages},
            "scaler": dict(self.scaler.state_dict()),
        }

    def load_state(self, state: State) -> None:
        """Inverse of `state`. Raises UserError, before anything moves, when it is of another module or averages."""
        fault = misfit(state, _State)
        if fault is not None:
            raise UserError(f"the checkpoint is damaged: {fault}")
        require_fit(state["module"], self.module.state_dict(), "the checkpoint's module")
        if state["averages"].keys() != {a.profile.name for a in self.averages}:
            raise UserError(
                f"the checkpoint holds the averages {sorted(state['averages'])}; this run has "
                f"{sorted(a.profile.name for a in self.averages)}"
            )
        for average in self.averages:
            name = average.profile.name
            require_fit(state["averages"][name], average.state, f"the checkpoint's average {name}")
        load_optimizer_state(self.optimizer, self.names, state["optimizer"])
        self.module.load_state_dict(state["module"])
        for average in self.averages:
            for name, value in state["averages"][average.profile.name].items():
                average.state[name].copy_(value)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def _make_optimizer(
    parameters: list[nn.Parameter], config: TrainingConfig, betas: tuple[float, float] | None
) -> torch.optim.Optimizer:
    o = config.optimizer
    settings: dict[str, Any] = {"lr": o.lr, "betas": betas or o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.kind == "radam":
        return torch.optim.RAdam(parameters, foreach=True, **settings)
    kind = torch.optim.AdamW if o.kind == "adamw" else torch.optim.Adam
    return kind(parameters, fused=True, **settings)
