"""A part that learns: one network with its optimiser, averages and loss scale, and what one step of it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from imagewright.shapes import misfit
from imagewright.training.checkpoint import State, copied, load_optimizer_state, optimizer_state, require_fit
from imagewright.training.config import TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.ema import Ema, averages
from imagewright.training.parallel import Whole
from imagewright.training.radam import FusedRAdam
from imagewright.training.shares import Share
from imagewright.types import Settles, Trained, UserError


class _State(TypedDict):
    module: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    averages: dict[str, dict[str, Any]]
    scaler: dict[str, float]


class Learner:
    """Backward, gradient exchange, clipping, optimiser step and averages of one `Trained` part.

    held: how the processes of the run hold it; None = there is one.
    """

    def __init__(self, role: Trained, config: TrainingConfig, device: torch.device, held: Whole | None = None) -> None:
        self.module: nn.Module = role.module
        self.config = config
        self.held = held or Whole(self.module, Processes())
        weights = self.held.weights
        if not config.optimizer.decay_vectors:  # which then are a group of their own, behind the others
            weights = dict(sorted(weights.items(), key=lambda each: each[1].ndim < 2))
        self.names, self.parameters = list(weights), list(weights.values())
        self.settling = [m for m in self.module.modules() if isinstance(m, Settles)]
        self.lr_scale = role.lr_scale
        self.optimizer = _make_optimizer(self.parameters, config, role.betas)
        if role.groups is not None:
            self.names = _grouped(self.optimizer, self.held.weights, role.groups)
        begin(self.optimizer)
        self.averages: list[Ema] = averages(self.held.state, config.ema) if role.ema else []
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this loss's gradients; only this part's parameters receive any. last: of the step's micro-batches."""
        self.held.backward(self.scaler.scale(loss), last=last)

    def restart(self) -> None:
        """Forget the optimiser's moments and its count of steps."""
        self.optimizer.state.clear()
        begin(self.optimizer)

    @property
    def can_halt(self) -> bool:
        """Whether `step` minds a flag on the device; where not, whoever calls it has to look at the gradient first."""
        if isinstance(self.optimizer, FusedRAdam):
            return self.optimizer.minds
        return bool(self.optimizer.defaults.get("fused"))

    def gradient(self) -> Tensor:
        """Sum the gradients over all processes, undo the loss scale, and clip. Returns their norm before, [].

        What modules noted beside their gradients (`Settles`) is summed and settled, too.
        """
        self.held.gradients()
        for module in self.settling:
            module.settle(self.held.processes.total)
        self.scaler.unscale_(self.optimizer)
        norm = self.held.norm()
        for found in self._overflows():  # which another process may have, in its share
            found.copy_(torch.maximum(found, 1 - torch.isfinite(norm).to(found)))
        limit = self.config.optimizer.clip_norm
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def _overflows(self) -> list[Tensor]:
        """What the loss scale found in this step's gradients, one number of 0 or 1 each; [] without a scale.

        The scaler keeps its findings to itself.
        """
        if not self.scaler.is_enabled():
            return []
        return list(self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"].values())

    def step(self, images: int, factor: float = 1.0, halted: Tensor | None = None) -> float:
        """One optimiser step, after `gradient`, at `images` images seen (this batch counted). Returns its rate.

        factor: on the learning rate of this step. halted: where it is 1 no weight moves. With a loss scale the steps
        whose gradients overflow are left out.
        """
        rate = factor * self.lr_scale * self.config.optimizer.lr_at(images, self.config.total_images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        if self.scaler.is_enabled():
            self._scaled_step(halted)
        else:
            if halted is not None:
                self.optimizer.found_inf = halted  # type: ignore[attr-defined]  # the fused kernels' own word for it
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.held.settle()
        for average in self.averages:
            average.update(self.held.state, images, self.config.batch)
        return rate

    def _scaled_step(self, halted: Tensor | None) -> None:
        if halted is not None:
            # The scaler multiplies a fused step's gradients by nothing and skips it where it found an overflow; of a
            # run that has to halt it is told one.
            for found in self._overflows():
                found.copy_(torch.maximum(found, halted.to(found.device)))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state(self) -> State:
        """Everything that a resumed run needs, as nested tensors and numbers."""
        moments = optimizer_state(self.optimizer, self.names)
        return {
            "module": self._shares(self.held.state),
            "optimizer": {n: {k: self.held.share(n, v) for k, v in each.items()} for n, each in moments.items()},
            "averages": {a.profile.name: self._shares(a.state) for a in self.averages},
            "scaler": dict(self.scaler.state_dict()),
        }

    def load_state(self, state: State) -> None:
        """Inverse of `state`. Raises UserError, before anything moves, when it is of another module or averages."""
        fault = misfit(state, _State)
        if fault is not None:
            raise UserError(f"the checkpoint is damaged: {fault}")
        if state["averages"].keys() != {a.profile.name for a in self.averages}:
            raise UserError(
                f"the checkpoint holds the averages {sorted(state['averages'])}; this run has "
                f"{sorted(a.profile.name for a in self.averages)}"
            )
        mine = self.held.mine
        kept = {"module": state["module"], **{f"average {name}": each for name, each in state["averages"].items()}}
        places = {"module": self.held.state, **{f"average {a.profile.name}": a.state for a in self.averages}}
        found = {what: {n: mine(n, v) for n, v in each.items()} for what, each in kept.items()}
        for what, tensors in places.items():
            require_fit(found[what], tensors, f"the checkpoint's {what}")
        moments = {n: {k: mine(n, v) for k, v in each.items()} for n, each in state["optimizer"].items()}
        absent = self.held.local.keys() - self.held.weights.keys()  # of which this process has no row
        load_optimizer_state(self.optimizer, self.names, {n: v for n, v in moments.items() if n not in absent})
        for what, tensors in places.items():
            copied(found[what], tensors)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _shares(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Share]:
        return {name: self.held.share(name, value) for name, value in values.items()}


def summed(loss: Tensor) -> Tensor:
    """The sum of an update's loss, [], in 32 bits at least: halves have too few for a batch, and too short a range."""
    return loss.to(torch.promote_types(loss.dtype, torch.float32)).sum()


def _make_optimizer(
    weights: list[Tensor], config: TrainingConfig, betas: tuple[float, float] | None
) -> torch.optim.Optimizer:
    o, parameters = config.optimizer, _groups(weights, config.optimizer.decay_vectors)
    settings: dict[str, Any] = {"lr": o.lr, "betas": betas or o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    if o.kind == "sgd":
        return torch.optim.SGD(
            parameters, o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
        )
    if o.kind == "adafactor":
        # torch squares the first: the published 1e-30. Rates are in units of a weight's own root mean square.
        return torch.optim.Adafactor(parameters, o.lr, eps=(1e-15, 1e-3), weight_decay=o.weight_decay, foreach=True)
    if o.kind == "radam":
        on_cuda = weights[0].device.type == "cuda"
        return (FusedRAdam if on_cuda else torch.optim.RAdam)(parameters, foreach=True, **settings)
    kind = torch.optim.AdamW if o.kind == "adamw" else torch.optim.Adam
    return kind(parameters, fused=True, **settings)


def _grouped(
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    of: Callable[[str, Tensor], tuple[float, bool]],
) -> list[str]:
    """Give weights rates and decay of their own. Returns their names in the optimiser's new order."""
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    found: dict[tuple[float, float], list[str]] = {}
    for name, weight in weights.items():
        scale, decays = of(name, weight)
        found.setdefault((scale, decay[id(weight)] if decays else 0.0), []).append(name)
    plain = optimizer.param_groups[0]
    optimizer.param_groups = [
        {**plain, "params": [weights[name] for name in names], "scale": scale, "weight_decay": of_these}
        for (scale, of_these), names in found.items()
    ]
    return [name for names in found.values() for name in names]


def _groups(weights: list[Tensor], decay_vectors: bool) -> Any:
    """All weights; or two groups, of which the second, vectors and single numbers, does not decay."""
    if decay_vectors:
        return weights
    tables, vectors = ([w for w in weights if (w.ndim >= 2) == wanted] for wanted in (True, False))
    return [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD its momentum of zero: torch makes it of whatever lies in memory where a first step is left out."""
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            if group["momentum"]:
                optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]})
