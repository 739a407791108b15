"""A rehearsal of a claim: all that its rows depend on, in seconds, so that two states of its code can be compared.

It also runs as a program under the package of another state (`python -P rehearsal.py KEY`, PYTHONPATH its `src`), so it
uses of the package only what older ones have, too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

SEED = 0
UPDATES = 3
PROOF = (
    f"of seed {SEED} equal to the bit before and after: rows and effects of the smoke budget, and of the full one with "
    f"trainings cut to {UPDATES} updates, and the settings of these trainings"
)


@contextmanager
def cut_trainings(notes: list[str]) -> Iterator[None]:
    """Inside, every training ends after three updates, and notes what it was asked for.

    Claims must be imported inside for the first time: they take `plane.train` by name.
    """
    from imagewright.bench.claims import plane
    from imagewright.training.trainer import Trainer

    begin, step, fit = Trainer.__init__, Trainer.train_step, plane.train
    cutting = True

    def noted(self: Trainer, method: Any, parts: Any, loader: Any, config: Any, *args: Any, **more: Any) -> None:
        notes.append(f"{method} {sorted(parts.roles)} {config}")
        begin(self, method, parts, loader, config, *args, **more)

    def short(self: Trainer) -> float:
        if self.step_index < UPDATES:
            return step(self)
        self.step_index += 1
        self.images += self.config.batch
        return 0.0

    def fitted(denoiser: Any, draw: Any, config: Any, *args: Any, **more: Any) -> Any:
        notes.append(f"{type(denoiser).__name__} {config}")
        return fit(denoiser, draw, replace(config, iterations=UPDATES) if cutting else config, *args, **more)

    Trainer.__init__, Trainer.train_step, plane.train = noted, short, fitted  # type: ignore[method-assign]
    try:
        yield
    finally:
        cutting = False
        Trainer.__init__, Trainer.train_step, plane.train = begin, step, fit  # type: ignore[method-assign]


def rehearse(key: str) -> dict[str, Any]:
    """Rows and effects of both budgets, and the settings of the full one's trainings."""
    notes: list[str] = []
    with cut_trainings(notes):
        claim = import_module(f"imagewright.bench.claims.{key}").CLAIM
        try:
            full = claim.run(SEED, "full")
        except (IndexError, RuntimeError, ValueError):
            full = None
    if full is None:  # it keeps what its trainings pass through: whole, then
        notes.clear()
        full = claim.run(SEED, "full")
    found = {"settings": sorted(re.sub(r" at 0x[0-9a-f]+", "", note) for note in notes)}
    return found | {"full": _shown(claim, full), "smoke": _shown(claim, claim.run(SEED, "smoke"))}


def _shown(claim: Any, rows: Any) -> list[Any]:
    """Rows, then the checks' names, rules and effects."""
    from imagewright.bench.claims import Rows

    shown: list[Any] = [asdict(row) for row in rows]
    for check in claim.checks:
        try:
            effect = float(check.effect(Rows(rows)))
        except ZeroDivisionError:
            effect = float("inf")
        shown.append({"says": check.says, "scale": check.scale, "margin": check.least, "effect": effect})
    return shown


def main() -> None:
    """As JSON."""
    print(json.dumps(rehearse(sys.argv[1])))


if __name__ == "__main__":
    main()
