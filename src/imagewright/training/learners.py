"""A part that learns: one network with its optimiser, averages and loss scale, and what one step of it does."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from imagewright.shapes import misfit
from imagewright.training.checkpoint import State, load_optimizer_state, optimizer_state, require_fit
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.ema import Ema, averages
from imagewright.types import Settles, Trained, UserError


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
        self.settling = [m for m in self.module.modules() if isinstance(m, Settles)]
        self.lr_scale = role.lr_scale
        self.optimizer = _make_optimizer(self.parameters, config, role.betas)
        begin(self.optimizer)
        self.averages: list[Ema] = averages(self.module, config.ema) if role.ema else []
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients; only this part's parameters receive any."""
        torch.autograd.backward(self.scaler.scale(loss), inputs=self.parameters)

    def restart(self) -> None:
        """Forget the optimiser's moments and its count of steps."""
        self.optimizer.state.clear()
        begin(self.optimizer)

    @property
    def can_halt(self) -> bool:
        """Whether `step` minds a flag on the device; where not, whoever calls it has to look at the gradient first."""
        return bool(self.optimizer.defaults.get("fused"))

    def gradient(self, processes: Processes) -> Tensor:
        """Sum the gradients over all processes, undo the loss scale, and clip. Returns their norm before, [].

        What modules noted beside their gradients (`Settles`) is summed and settled, too.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        processes.average_(gradients)
        for module in self.settling:
            module.settle(processes.total)
        self.scaler.unscale_(self.optimizer)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        limit = self.config.optimizer.clip_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def step(self, images: int, factor: float = 1.0, halted: Tensor | None = None) -> float:
        """One optimiser step, after `gradient`, at `images` images seen (this batch counted). Returns its rate.

        factor: on the learning rate of this step. halted: where it is 1 no weight moves. With a loss scale the steps
        whose gradients overflow are left out.
        """
        rate = factor * self.lr_scale * self.config.optimizer.lr_at(images, self.config.total_images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler.is_enabled():
            self._scaled_step(halted)
        else:
            if halted is not None:
                self.optimizer.found_inf = halted  # type: ignore[attr-defined]  # the fused kernels' own word for it
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update(self.module, images, self.config.batch)
        return rate

    def _scaled_step(self, halted: Tensor | None) -> None:
        if halted is not None:
            # The scaler keeps its findings to itself, but multiplies a fused step's gradients by nothing and skips it
            # where it found an overflow; of a run that has to halt it is told one.
            for found in self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"].values():
                found.copy_(torch.maximum(found, halted.to(found.device)))
        self.scaler.step(self.optimizer)
        self.scaler.update()

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
    if o.kind == "sgd":
        return torch.optim.SGD(
            parameters, o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
        )
    if o.kind == "adafactor":
        # torch squares the first: the published 1e-30. Rates are in units of a weight's own root mean square.
        return torch.optim.Adafactor(parameters, o.lr, eps=(1e-15, 1e-3), weight_decay=o.weight_decay, foreach=True)
    if o.kind == "radam":
        return torch.optim.RAdam(parameters, foreach=True, **settings)
    kind = torch.optim.AdamW if o.kind == "adamw" else torch.optim.Adam
    return kind(parameters, fused=True, **settings)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD its momentum of zero: torch makes it of whatever lies in memory where a first step is left out."""
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            if group["momentum"]:
                optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
