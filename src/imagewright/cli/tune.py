"""`imagewright tune skip | ema | lcsc | bespoke | autodiffusion | times | jumps | sims | ddo | quantize`: searches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.cli.command import dispatch
from imagewright.cli.console import bar, say
from imagewright.cli.sampling import Changes
from imagewright.cli.tune_common import (
    Scorer,
    Scoring,
    Told,
    fresh,
    print_scores,
    require_denoiser,
    save,
    tuned_path,
    write,
)
from imagewright.cli.tune_ddo import ddo
from imagewright.cli.tune_lcsc import lcsc
from imagewright.cli.tune_quantize import quantize
from imagewright.cli.tune_sims import sims
from imagewright.guidance import SkipScale, SkipTuned
from imagewright.guidance.layer_skipping import layers_of
from imagewright.models.weighted import at_weight
from imagewright.pretrained import find_model
from imagewright.samplers import Heun, Jumps, MultistepConsistency
from imagewright.samplers.generator import sampler_to_json
from imagewright.training.distributed import pick_device
from imagewright.training.posthoc import reconstruct
from imagewright.tuning import autodiffusion as auto
from imagewright.tuning.bespoke import BespokeTraining, train_bespoke
from imagewright.tuning.consistency_times import Levels, TimesSearch, search_times
from imagewright.tuning.feature_distance import FeatureDistance
from imagewright.tuning.jumps import JumpsSearch, search_jumps
from imagewright.tuning.scores import lowest
from imagewright.types import UserError, kind_of

HELP = """imagewright tune WHAT MODEL [options]

skip           the factor on a U-Net's lowest skip connection that draws best at few steps (Skip-Tuning)
ema            an average of any length from a run's kept ones (post-hoc EMA)
lcsc           a linear combination of a run's kept weights, searched for the sampler you want (LCSC)
bespoke        a solver of few steps learnt for this very model (Bespoke solvers)
autodiffusion  which time steps to take, and which layers to skip at each (AutoDiffusion)
times          the noise levels of a flow map's further steps (consistency models)
jumps          how much noise a flow map's jumps draw anew, and at which strength of guidance (Align Your Flow)
sims           train a copy on the model's own samples, and move away from it (SIMS)
ddo            alpha and beta of a round against the model's former self (DDO)
quantize       the model in few bits, without data (AAC and ABN)

examples:
  imagewright tune skip runs/edm-digits --steps 5
  imagewright tune ema runs/edm-digits --std 0.07 --out runs/edm-digits-007
  imagewright tune lcsc runs/cd-digits --out runs/cd-digits-lcsc
  imagewright tune lcsc runs/edm-digits --sampler unipc --steps 8 --out runs/edm-digits-lcsc
  imagewright tune bespoke runs/edm-digits --steps 5     # then: sample --sampler runs/edm-digits/tuned/bespoke2-5.json
  imagewright tune times runs/cd-digits --steps 2        # then: sample --sampler runs/cd-digits/tuned/times-2.json
  imagewright tune jumps runs/ayf-digits --steps 4       # then: sample --sampler runs/ayf-digits/tuned/jumps-4.json
  imagewright tune sims runs/edm-digits --out runs/edm-digits-sims
  imagewright tune ddo ddo-digits --reference runs/edm-digits --out runs/ddo-sweep
  imagewright tune quantize runs/edm-digits --bits 4 --out runs/edm-digits-4
"""


def skip(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 5,
    factors: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    told: Told = Scoring(),  # noqa: B008, frozen
) -> None:
    """Measure factors on the lowest skip connection (rising to 1 at the top) at a number of Heun steps.

    Args:
        model: run, model folder or shipped model with a U-Net.
        steps: Heun steps; fewer steps often want smaller factors.
        factors: what to try.
        told: about the score.
    """
    if not factors:
        raise UserError("--factors is empty; give at least one factor")
    if told.changes.skip_scale is not None:
        raise UserError("--skip-scale has no effect here; --factors are what is tried")
    file = find_model(model)
    scorer, scores = Scorer.of(model, file, told), {}
    with bar("factors", len(factors), "factors") as advance_to:
        for done, factor in enumerate(factors):
            tuned = SkipTuned(file.model, SkipScale(bottom=factor))
            scores[factor] = scorer.score(tuned, file, Heun(num_steps=steps))
            advance_to(done + 1)
    print_scores("skip factor", {f"{factor:g}": value for factor, value in scores.items()})
    best = lowest(scores.items())
    say(f"use it with: imagewright sample {model} --steps {steps} --skip-scale {best:g}")


def ema(run: Annotated[Path, tyro.conf.Positional], std: float, out: Path, images: int | None = None) -> None:
    """Reconstruct the power-function average of any relative width, from the averages that a run kept.

    Args:
        run: a run trained with --training.weights-images and --training.ema.power-std 0.05 0.1.
        std: relative width, in (0, 0.29).
        out: model folder to write.
        images: after how many images of training; default the newest kept.
    """
    file = fresh(run, out)
    save(file, reconstruct(run, std, images), out, {"average": {"std": std, "images": images}})


def bespoke(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 5,
    order: int = 2,
    iterations: int = 1000,
    batch: int = 16,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Learn a solver for this model: minutes for a few dozen numbers.

    Args:
        model: run, model folder or shipped model.
        steps: of the solver; one network call each for order 1, two for order 2.
        order: 1 (Euler) or 2 (midpoint).
        iterations: of training.
        batch: paths per iteration.
        seed: of noise and classes.
        out: file to write; default tuned/bespoke<order>-<steps>.json in the run folder.
        device: auto, cpu, cuda, mps.
    """
    file, target = find_model(model), pick_device(device)
    require_denoiser(model, file.model, of_a_flow=True)
    path = out or tuned_path(model, f"bespoke{order}-{steps}")
    config = BespokeTraining(num_steps=steps, order=order, iterations=iterations, batch=batch, seed=seed)
    with bar("iterations", iterations, "iterations") as advance_to:
        result = train_bespoke(
            file.model.to(target),  # type: ignore[arg-type]  # a module that is a Denoiser
            file.seen.shape,
            file.spec.num_classes,
            config,
            lambda p: advance_to(p.iteration, f"error {p.val_rmse:.4g}"),
            target,
        )
    print_scores("solver (error of the end point)", {"plain": result.base_rmse, "bespoke": result.val_rmse})
    found = {"val_rmse": result.val_rmse, "base_rmse": result.base_rmse, "training": asdict(config)}
    write(path, model, {"sampler": sampler_to_json(result.sampler), "found": found})


def autodiffusion(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 4,
    generations: int = 10,
    population: int = 50,
    max_layers: int = 0,
    told: Told = Scoring(n=500),  # noqa: B008, frozen
    out: Path | None = None,
) -> None:
    """Search which time steps to take, and with --max-layers which layers to skip at each, by evolution.

    Args:
        model: run, model folder or shipped model.
        steps: network calls (DDIM) of the result; with a layer budget it may take more, cheaper ones.
        generations: of the search.
        population: candidates in each; of the published 50, 25 are mutants and 15 children (10 with --max-layers),
            others keep these shares.
        max_layers: most layers executed over all steps; 0 skips none.
        told: about the score.
        out: file to write; default tuned/autodiffusion-<steps>.json in the run folder.
    """
    file = find_model(model)
    if max_layers and told.changes != Changes():
        raise UserError(
            "--max-layers leaves out layers of the plain model; guidance and skip factors do not go with it"
        )
    path = out or tuned_path(model, f"autodiffusion-{steps}")
    scorer, layers = Scorer.of(model, file, told), 0
    if max_layers:
        layers = len(layers_of(SkipTuned(file.model, SkipScale()).denoiser.network))  # type: ignore[arg-type]
    space = auto.Space(steps=steps, layers=layers, max_layers=max_layers)
    measure = FeatureDistance(
        model=told.changes.apply(file),
        spec=file.spec,
        space=file.space,
        extractor=scorer.extractor,
        reference=scorer.moments,
        schedule=space.schedule,
        images=told.n,
        seed=told.seed,
        device=scorer.device,
    )
    published = auto.AutoDiffusion.joint if max_layers else auto.AutoDiffusion
    config = published(generations=generations, seed=told.seed).sized(population)
    with bar("candidates", generations * population, "candidates") as advance_to:
        found = auto.search(space, measure, config, lambda k, best: advance_to(k, f"{best:.4g}"))
    print_scores("time steps", {"uniform": found.uniform or float("nan"), "AutoDiffusion": found.fitness})
    generator = measure.generator(found.best)
    levels = found.best.levels(space.schedule, file.model)  # type: ignore[arg-type]
    skips = [[level, list(ids)] for level, ids in levels.items()] if any(levels.values()) else []
    record = {"sampler": sampler_to_json(generator.sampler), "skips": skips, "found": found.to_json()}
    write(path, model, record)


def times(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 2,
    points: int = 40,
    told: Told = Scoring(),  # noqa: B008, frozen
    out: Path | None = None,
) -> None:
    """Search the noise levels to which a flow map's samples are noised again, one after the other.

    Args:
        model: run or model folder of a flow map (a consistency model).
        steps: network calls of the sampler.
        points: of the noise grid whose inner points are candidates.
        told: about the score.
        out: file to write; default tuned/times-<steps>.json in the run folder.
    """
    file = find_model(model)
    if kind_of(file.model) != "flow_map":
        raise UserError(f"{model} is no flow map; tune times searches the steps of a flow map, such as a cd-digits run")
    path, config = out or tuned_path(model, f"times-{steps}"), TimesSearch(steps=steps, points=points)
    scorer = Scorer.of(model, file, told)
    flow_map: Any = file.model

    def score(sigmas: Levels) -> float:
        return scorer.score(file.model, file, MultistepConsistency(sigmas=sigmas))

    # One score without further levels, and for each level about two for every halving of the grid by a third.
    expected = 1 + (steps - 1) * (2 + 2 * math.ceil(math.log(points, 1.5)))
    with bar("levels", expected, "scores") as advance_to:
        found = search_times(
            score, flow_map.sigma_min, flow_map.sigma_max, config, lambda k, value: advance_to(k, f"{value:.4g}")
        )
    names = ["one step", *(f"{s:.4g}, after those above" for s in found.sigmas)]
    print_scores("level", dict(zip(names, found.scores, strict=True)))
    record = {"scores": found.scores, "measured": found.measured, "images": told.n, "seed": told.seed, "points": points}
    write(path, model, {"sampler": sampler_to_json(MultistepConsistency(sigmas=found.sigmas)), "found": record})


def jumps(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 4,
    shift: float = 1.0,
    gammas: tuple[float, ...] = JumpsSearch.gammas,
    strengths: int = JumpsSearch.strengths,
    told: Told = Scoring(),  # noqa: B008, frozen
    out: Path | None = None,
) -> None:
    """Search gamma, and the strength of guidance of a model that is told it, for jumps at stops even in time.

    Args:
        model: run or model folder of a flow map that stops anywhere, such as ayf-digits or ctm-digits.
        steps: network calls of the sampler.
        shift: of the stops, as the sampler's.
        gammas: what is tried; a single step has none.
        strengths: how many are tried, evenly over the range of training.
        told: about the score.
        out: file to write; default tuned/jumps-<steps>.json in the run folder.
    """
    file = find_model(model)
    if kind_of(file.model) != "flow_map":
        raise UserError(f"{model} is no flow map; tune jumps searches the jumps of one, such as an ayf-digits run")
    path, config = (
        out or tuned_path(model, f"jumps-{steps}"),
        JumpsSearch(steps=steps, gammas=gammas, strengths=strengths),
    )
    trained = getattr(file.model, "weights", None)
    if told.changes.weight is not None:
        raise UserError("--weight has no effect here; --strengths of the model's range are what is tried")
    scorer = Scorer.of(model, file, told)

    def sampler(gamma: float) -> Jumps:
        return Jumps(num_steps=steps, shift=shift, gamma=gamma)

    def score(gamma: float, weight: float | None) -> float:
        asked = file.model if weight is None else at_weight(file.model, weight)
        return scorer.score(asked, file, sampler(gamma))

    expected = len(config.weights(trained)) + (len(gammas) if steps > 1 else 0)
    with bar("settings", expected, "scores") as advance_to:
        found = search_jumps(score, config, trained, lambda k, value: advance_to(k, f"{value:.4g}"))
    words = {f"gamma {g:g}" + ("" if w is None else f", weight {w:g}"): value for (g, w), value in found.measured}
    print_scores("jumps", words)
    record = {"measured": found.measured, "images": told.n, "seed": told.seed}
    write(path, model, {"sampler": sampler_to_json(sampler(found.gamma)), "weight": found.weight, "found": record})


COMMANDS: dict[str, Callable[..., None]] = {
    "skip": skip,
    "ema": ema,
    "lcsc": lcsc,
    "bespoke": bespoke,
    "autodiffusion": autodiffusion,
    "times": times,
    "jumps": jumps,
    "sims": sims,
    "ddo": ddo,
    "quantize": quantize,
}


def main(args: Sequence[str]) -> None:
    """Dispatch to the search."""
    dispatch(COMMANDS, args, "imagewright tune", HELP)
