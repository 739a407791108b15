"""`imagewright bench speed`: ratios, measured in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.table import Table

from imagewright.bench.speed import measure_sampling, measure_training
from imagewright.cli.console import OUT, say
from imagewright.files import write_json
from imagewright.training.distributed import pick_device
from imagewright.types import UserError


def speed(rounds: int = 9, device: str = "auto", out: Path | None = None) -> None:
    """One-step sampling against the bare network in a loop, and the training step against diffusers' UNet2DModel.

    Both sides of a ratio alternate within one process; medians and the range of the paired ratios are shown.

    Args:
        rounds: measurements of each side.
        device: auto, cpu, cuda, mps.
        out: also write the figures as JSON.
    """
    if rounds < 3:
        raise UserError(f"--rounds is {rounds}; it must be at least 3")
    target = pick_device(device)
    results = [measure_sampling(target, rounds), *measure_training(target, rounds)]
    table = Table("what", "ours (images/s)", "against", "its images/s", "ratio", "range")
    for r in results:
        table.add_row(
            r.what,
            f"{r.ours:.1f}",
            r.peer,
            f"{r.theirs:.1f}" if r.theirs else "not installed",
            f"{r.ratio:.3f}" if r.theirs else "",
            f"{r.low:.3f} to {r.high:.3f}" if r.theirs else "",
        )
    OUT.print(table)
    if out is not None:
        record = {"format": "imagewright-speed/1", "device": str(target), "results": [r.as_dict() for r in results]}
        write_json(out, record)
        say(f"written to {out}")


def main(args: Sequence[str]) -> None:
    """Dispatch to the benchmark."""
    if not args or args[0] in ("-h", "--help"):
        say("imagewright bench speed [--rounds 9] [--device auto] [--out speed.json]\n\n" + (speed.__doc__ or ""))
        return
    if args[0] != "speed":
        raise UserError(f"there is no benchmark {args[0]!r}; allowed: speed")
    tyro.cli(speed, args=args[1:], prog="imagewright bench speed")
