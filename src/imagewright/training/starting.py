"""`--start RUN`: a run whose product, and what learns beside it, begin as those of another."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from imagewright.training.checkpoint import checkpoints, load_checkpoint
from imagewright.types import Average, Parts, Trained, UserError


def start_from(name: str, model: nn.Module, parts: Parts, product: str) -> None:
    """Give the product, and the averages that begin with its weights, those of a run or model.

    Raises UserError where they do not fit.
    """
    module = parts.roles[product].module
    theirs, ours = getattr(model, "sigma_max", 0.0), getattr(module, "sigma_max", math.inf)
    if ours < theirs:
        raise UserError(
            f"start {name} knows noise levels up to {theirs:g}; this run's sigma_max is {ours:g} and must be no less"
        )
    weights, wanted = model.state_dict(), module.state_dict()
    afresh, left = getattr(module, "begins_afresh", ()), getattr(model, "for_training", ())
    own = {k: v for k, v in wanted.items() if k.startswith(afresh) and k not in weights}
    weights = {**own, **{k: v for k, v in weights.items() if k in wanted or not k.startswith(left)}}
    different = [k for k in {**wanted, **weights} if k not in wanted or k not in weights]
    different += [k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape]
    if different:
        raise UserError(
            f"start {name} has another architecture than this run: {len(different)} entries differ, such as "
            f"{min(different)}"
        )
    module.load_state_dict(weights)
    for role in parts.roles.values():
        if isinstance(role, Average) and role.of == product:
            role.module.load_state_dict(weights)
    _start_others(name, parts, product)


def _start_others(name: str, parts: Parts, product: str) -> None:
    """Give the other trained parts the weights that a run's last checkpoint has of them; what only they have stays."""
    others = {n: r.module for n, r in parts.roles.items() if isinstance(r, Trained) and n != product}
    found = checkpoints(Path(name) / "checkpoints")
    if not others or not found:
        return
    learners = load_checkpoint(found[-1]).get("learners", {})
    for part, module in others.items():
        weights, wanted = learners.get(part, {"module": {}}).get("module", {}), module.state_dict()
        wrong = [k for k, v in weights.items() if k not in wanted or wanted[k].shape != v.shape]
        if wrong:
            raise UserError(
                f"start {name} has another {part} than this run: {len(wrong)} entries differ, such as {min(wrong)}"
            )
        module.load_state_dict({**wanted, **weights})
