"""`imagewright tune ddo RECIPE`: alpha and beta of a round of direct discriminative optimisation, each by a round."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.console import OUT, say, table
from imagewright.cli.sampling import Changes
from imagewright.cli.train import find_experiment
from imagewright.cli.tune_common import Scoring, Told, fresh
from imagewright.methods.ddo import DDO
from imagewright.models.files import load_model, read_model_record, save_model
from imagewright.training.distributed import pick_device
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.self_play import DrawNegatives, KeepBest
from imagewright.tuning.scores import lowest
from imagewright.types import UserError

Setting = tuple[float, float]


def ddo(
    recipe: Annotated[str, tyro.conf.Positional],
    out: Path,
    reference: str | None = None,
    negatives: str | None = None,
    samples: int = 5_000,
    alphas: tuple[float, ...] = (0.5, 1.0, 4.0),
    betas: tuple[float, ...] = (0.02, 0.05, 0.1),
    told: Told = Scoring(),  # noqa: B008, frozen
) -> None:
    """Train a round for each alpha and beta, from the same reference and negatives, and keep the best weights of all.

    Of every round its average and the weights that it kept along its way are measured, and the reference beside them.
    The same command again goes on where it stopped.

    Args:
        recipe: a round's recipe or Python file: ddo-digits.
        out: folder for negatives, rounds, and the best model.
        reference: run or model to improve; default the recipe's.
        negatives: what it drew; default: they are drawn now, as many as --samples.
        samples: images to draw.
        alphas: weights of the negatives (the paper's lie from 0.5 to 50).
        betas: scales of the log-likelihoods' difference (the paper's lie from 0.01 to 0.1).
        told: about the score.
    """
    run = _prepared(find_experiment(recipe), told)
    if reference is not None:
        run = run.giving(reference=reference)
    fresh(Path(str(run.given["reference"])), out)
    device = pick_device(told.device)
    if negatives is None:
        drawing = DrawNegatives(given={"model": str(run.given["reference"])}, n=samples)
        drawing(out / "negatives", {}, device)
    run = run.giving(negatives=negatives or str(out / "negatives"))
    keep = KeepBest(n=told.n, seed=told.seed, inception=told.inception)
    rows = table("alpha", "beta", "weights", "distance (lower is better)", "reference")
    found: list[tuple[Path, float]] = []
    for setting in product(alphas, betas):
        best = _round(run, setting, out, keep, device)
        origin = read_model_record(best)["origin"]
        found.append((best, origin["scores"][origin["kept"]]))
        numbers = (f"{x:.4g}" for x in (found[-1][1], origin["scores"]["reference"]))
        rows.add_row(*(f"{x:g}" for x in setting), origin["kept"], *numbers)
        say(f"alpha {setting[0]:g}, beta {setting[1]:g}: {found[-1][1]:.4g} ({origin['kept']})")
    OUT.print(rows)
    save_model(out, load_model(lowest(found)))
    say(f"written to {out}; measure it on another seed with: imagewright evaluate {out} --seed {told.seed + 1}")


def _prepared(run: Experiment, told: Scoring) -> Experiment:
    if not isinstance(run.method, DDO):
        raise UserError(
            f"tune ddo takes a round of DDO, such as ddo-digits; this is a run of {type(run.method).__name__}"
        )
    if told.changes != Changes() or told.data is not None:
        raise UserError("a round's images are compared with its own data, unguided; leave --data and guidance out")
    return run


def _round(run: Experiment, setting: Setting, out: Path, keep: KeepBest, device: object) -> Path:
    """The folder of the best weights of a round, which is trained unless it has been."""
    alpha, beta = setting
    folder = out / f"alpha{alpha:g}-beta{beta:g}"
    method = replace(run.method, alpha=alpha, beta=beta)
    resume = (folder / "experiment.json").exists()
    run_experiment(replace(run, method=method), folder, device=str(device), resume=resume)
    replace(keep, given={"run": str(folder)})(folder / "best", {}, device)
    return folder / "best"
