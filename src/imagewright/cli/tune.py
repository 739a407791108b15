"""`imagewright tune skip | ema | lcsc | bespoke | autodiffusion | times | sims`: searches over a trained model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.sampling import TUNED
from imagewright.cli.scoring import extractor_for, reference_images, training_data
from imagewright.cli.tune_sims import sims
from imagewright.files import write_json
from imagewright.guidance import SkipScale, SkipTuned
from imagewright.guidance.layer_skipping import layers_of
from imagewright.metrics import embed
from imagewright.metrics.draws import frechet_of_model
from imagewright.metrics.features import FeatureExtractor
from imagewright.metrics.statistics import Moments
from imagewright.models.files import ModelFile, save_model
from imagewright.pretrained import find_model
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.training.distributed import pick_device
from imagewright.training.posthoc import reconstruct
from imagewright.training.weights import combine, differences, stored, unflatten
from imagewright.tuning import autodiffusion as auto
from imagewright.tuning.bespoke import BespokeTraining, train_bespoke
from imagewright.tuning.consistency_times import Levels, TimesSearch, search_times
from imagewright.tuning.feature_distance import FeatureDistance
from imagewright.tuning.lcsc import LCSC, Vector, search
from imagewright.types import Sampler, UserError, kind_of
from imagewright.version import versions

HELP = """imagewright tune WHAT MODEL [options]

skip           the factor on a U-Net's lowest skip connection that draws best at few steps (Skip-Tuning)
ema            an average of any length from a run's kept ones (post-hoc EMA)
lcsc           a linear combination of a run's kept weights, searched for the steps you want (LCSC)
bespoke        a solver of few steps learnt for this very model (Bespoke solvers)
autodiffusion  which time steps to take, and which layers to skip at each (AutoDiffusion)
times          the noise levels of a flow map's further steps (consistency models)
sims           train a copy on the model's own samples, and move away from it (SIMS)

examples:
  imagewright tune skip runs/edm-digits --steps 5
  imagewright tune ema runs/edm-digits --std 0.07 --out runs/edm-digits-007
  imagewright tune lcsc runs/edm-digits --steps 5 --out runs/edm-digits-lcsc
  imagewright tune bespoke runs/edm-digits --steps 5     # then: sample --sampler runs/edm-digits/tuned/bespoke2-5.json
  imagewright tune times runs/cd-digits --steps 2        # then: sample --sampler runs/cd-digits/tuned/times-2.json
  imagewright tune sims runs/edm-digits --out runs/edm-digits-sims
"""


@dataclass(frozen=True)
class Scorer:
    """A model's real images and features, and the score that a search minimises."""

    extractor: FeatureExtractor
    moments: Moments
    device: torch.device

    @classmethod
    def of(cls, model: str, file: ModelFile, data: str | None, device: str) -> Scorer:
        """Real training images through the extractor of their set."""
        source = data or training_data(model, file.spec)
        images = reference_images(source, file.spec, "train" if source in ("digits", "emoji64") else "all")
        extractor = extractor_for(source)
        return cls(extractor, embed(images, extractor).moments, pick_device(device))

    def score(self, model: nn.Module, file: ModelFile, sampler: Sampler, n: int, seed: int) -> float:
        """Frechet distance of n images of a seed: the same noise and labels for every candidate."""
        generator = ImageGenerator(model, file.spec, sampler, self.device)
        return frechet_of_model(generator, n, self.extractor, self.moments, seed=seed)


def skip(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 5,
    factors: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    n: int = 1000,
    seed: int = 0,
    data: str | None = None,
    device: str = "auto",
) -> None:
    """Measure factors on the lowest skip connection (rising to 1 at the top) at a number of Heun steps.

    Args:
        model: run, model folder or shipped model with a U-Net.
        steps: Heun steps; fewer steps want smaller factors.
        factors: what to try.
        n: images for each factor.
        seed: of the images; score the choice on another seed with `imagewright evaluate`.
        data: real images; default what the model was trained on.
        device: auto, cpu, cuda, mps.
    """
    if not factors:
        raise UserError("--factors is empty; give at least one factor")
    file = find_model(model)
    scorer, scores = Scorer.of(model, file, data, device), {}
    with bar("factors", len(factors), "factors") as advance_to:
        for done, factor in enumerate(factors):
            tuned = SkipTuned(file.model, SkipScale(bottom=factor))
            scores[factor] = scorer.score(tuned, file, Heun(num_steps=steps), n, seed)
            advance_to(done + 1)
    _scores("skip factor", {f"{factor:g}": value for factor, value in scores.items()})
    best = min(scores, key=lambda factor: scores[factor])
    say(f"use it with: imagewright sample {model} --steps {steps} --skip-scale {best:g}")


def ema(run: Annotated[Path, tyro.conf.Positional], std: float, out: Path, images: int | None = None) -> None:
    """Reconstruct the power-function average of any relative width, from the averages that a run kept.

    Args:
        run: a run trained with --training.weights-images and --training.ema.power-std 0.05 0.1.
        std: relative width, in (0, 0.29).
        out: model folder to write.
        images: after how many images of training; default the newest kept.
    """
    file = _fresh(run, out)
    _save(file, reconstruct(run, std, images), out, {"average": {"std": std, "images": images}})


def lcsc(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    steps: int = 5,
    evaluations: int = 300,
    n: int = 1000,
    seed: int = 0,
    data: str | None = None,
    device: str = "auto",
) -> None:
    """Search a linear combination of the raw weights that a run kept, for the number of steps you will draw with.

    Args:
        run: a run trained with --training.weights-images.
        out: model folder to write.
        steps: Heun steps that the combination is searched for; it suits no other number as well.
        evaluations: candidates to measure.
        n: images for each.
        seed: of the search and its images.
        data: real images; default what the run was trained on.
        device: auto, cpu, cuda, mps.
    """
    file, files = _fresh(run, out), [s.path for s in stored(run, "raw")]
    first, rows = differences(files)
    scorer, candidate = Scorer.of(str(run), file, data, device), copy.deepcopy(file.model)

    def fitness(alpha: Vector) -> float:
        start = torch.cat([first[k].float().flatten() for k in sorted(first) if first[k].is_floating_point()])
        candidate.load_state_dict(unflatten(start + torch.from_numpy(alpha[1:]).float() @ rows, first))
        return scorer.score(candidate, file, Heun(num_steps=steps), n, seed)

    with bar("candidates", evaluations, "candidates") as advance_to:
        found = search(
            len(files), fitness, LCSC(evaluations=evaluations, seed=seed), lambda k, best: advance_to(k, f"{best:.4g}")
        )
    _scores("weights", {"best average": found.best_average, "LCSC": found.fitness})
    origin = {"lcsc": {"steps": steps, "coefficients": found.coefficients.tolist(), "fitness": found.fitness}}
    tuned = replace(file, sampler=sampler_to_json(Heun(num_steps=steps)))
    _save(tuned, combine(files, found.coefficients.tolist()), out, origin)


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
    path = out or _tuned(model, f"bespoke{order}-{steps}")
    config = BespokeTraining(num_steps=steps, order=order, iterations=iterations, batch=batch, seed=seed)
    with bar("iterations", iterations, "iterations") as advance_to:
        result = train_bespoke(
            file.model.to(target),  # type: ignore[arg-type]  # a module that is a Denoiser
            file.spec.shape,
            file.spec.num_classes,
            config,
            lambda p: advance_to(p.iteration, f"error {p.val_rmse:.4g}"),
            target,
        )
    _scores("solver (error of the end point)", {"plain": result.base_rmse, "bespoke": result.val_rmse})
    found = {"val_rmse": result.val_rmse, "base_rmse": result.base_rmse, "training": asdict(config)}
    _write(path, model, {"sampler": sampler_to_json(result.sampler), "found": found})


def autodiffusion(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 4,
    generations: int = 10,
    population: int = 50,
    n: int = 500,
    max_layers: int = 0,
    seed: int = 0,
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Search which time steps to take, and with --max-layers which layers to skip at each, by evolution.

    Args:
        model: run, model folder or shipped model.
        steps: network calls (DDIM) of the result; with a layer budget it may take more, cheaper ones.
        generations: of the search.
        population: candidates in each.
        n: images for each candidate.
        max_layers: most layers executed over all steps; 0 skips none.
        seed: of the search and its images.
        data: real images; default what the model was trained on.
        out: file to write; default tuned/autodiffusion-<steps>.json in the run folder.
        device: auto, cpu, cuda, mps.
    """
    file = find_model(model)
    path = out or _tuned(model, f"autodiffusion-{steps}")
    scorer, layers = Scorer.of(model, file, data, device), 0
    if max_layers:
        layers = len(layers_of(SkipTuned(file.model, SkipScale()).denoiser.network))  # type: ignore[arg-type]
    space = auto.Space(steps=steps, layers=layers, max_layers=max_layers)
    measure = FeatureDistance(
        model=file.model,
        spec=file.spec,
        extractor=scorer.extractor,
        reference=scorer.moments,
        schedule=space.schedule,
        images=n,
        seed=seed,
        device=scorer.device,
    )
    settings: dict[str, Any] = {"generations": generations, "population": population, "seed": seed}
    config = auto.AutoDiffusion.joint(**settings) if max_layers else auto.AutoDiffusion(**settings)
    with bar("candidates", generations * population, "candidates") as advance_to:
        found = auto.search(space, measure, config, lambda k, best: advance_to(k, f"{best:.4g}"))
    _scores("time steps", {"uniform": found.uniform or float("nan"), "AutoDiffusion": found.fitness})
    generator = measure.generator(found.best)
    levels = found.best.levels(space.schedule, file.model)  # type: ignore[arg-type]
    skips = [[level, list(ids)] for level, ids in levels.items()] if any(levels.values()) else []
    record = {"sampler": sampler_to_json(generator.sampler), "skips": skips, "found": found.to_json()}
    _write(path, model, record)


def times(
    model: Annotated[str, tyro.conf.Positional],
    steps: int = 2,
    points: int = 40,
    n: int = 1000,
    seed: int = 0,
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Search the noise levels to which a flow map's samples are noised again, one after the other.

    Args:
        model: run or model folder of a flow map (a consistency model).
        steps: network calls of the sampler.
        points: of the noise grid whose inner points are candidates.
        n: images for each candidate.
        seed: of the images; score the choice on another seed with `imagewright evaluate`.
        data: real images; default what the model was trained on.
        out: file to write; default tuned/times-<steps>.json in the run folder.
        device: auto, cpu, cuda, mps.
    """
    file = find_model(model)
    if kind_of(file.model) != "flow_map":
        raise UserError(f"{model} is a denoiser; tune times searches the steps of a flow map, such as a cd-digits run")
    path, config = out or _tuned(model, f"times-{steps}"), TimesSearch(steps=steps, points=points)
    scorer = Scorer.of(model, file, data, device)
    flow_map: Any = file.model

    def score(sigmas: Levels) -> float:
        return scorer.score(file.model, file, MultistepConsistency(sigmas=sigmas), n, seed)

    # One score without further levels, and for each level about two for every halving of the grid by a third.
    expected = 1 + (steps - 1) * (2 + 2 * math.ceil(math.log(points, 1.5)))
    with bar("levels", expected, "scores") as advance_to:
        found = search_times(
            score, flow_map.sigma_min, flow_map.sigma_max, config, lambda k, value: advance_to(k, f"{value:.4g}")
        )
    names = ["one step", *(f"{s:.4g}, after those above" for s in found.sigmas)]
    _scores("level", dict(zip(names, found.scores, strict=True)))
    record = {"scores": found.scores, "measured": found.measured, "images": n, "seed": seed, "points": points}
    _write(path, model, {"sampler": sampler_to_json(MultistepConsistency(sigmas=found.sigmas)), "found": record})


def _fresh(run: Path, out: Path) -> ModelFile:
    if (out / "model.json").exists():
        raise UserError(f"{out} already holds a model; choose another --out")
    return find_model(run)


def _save(file: ModelFile, state: dict[str, torch.Tensor], out: Path, origin: dict[str, Any]) -> None:
    file.model.load_state_dict(state)
    save_model(out, replace(file, origin={**file.origin, **origin}))
    say(f"written to {out}; measure it with: imagewright evaluate {out}")


def _tuned(model: str, name: str) -> Path:
    if not Path(model).is_dir():
        raise UserError(f"{model} is not a folder to write into; say with --out where the result goes")
    return Path(model) / "tuned" / f"{name}.json"


def _write(path: Path, model: str, record: dict[str, Any]) -> None:
    write_json(path, {"format": TUNED, "model": model, **record, "versions": versions()})
    say(f"written to {path}; use it with: imagewright sample {model} --sampler {path}")


def _scores(what: str, values: dict[str, float]) -> None:
    rows = table(what, "lower is better")
    for name, value in values.items():
        rows.add_row(name, f"{value:.4g}")
    OUT.print(rows)


COMMANDS: dict[str, Callable[..., None]] = {
    "skip": skip,
    "ema": ema,
    "lcsc": lcsc,
    "bespoke": bespoke,
    "autodiffusion": autodiffusion,
    "times": times,
    "sims": sims,
}


def main(args: Sequence[str]) -> None:
    """Dispatch to the search."""
    if not args or args[0] in ("-h", "--help"):
        say(HELP)
        return
    if args[0] not in COMMANDS:
        raise UserError(f"there is no search {args[0]!r}; allowed: {', '.join(COMMANDS)}")
    tyro.cli(COMMANDS[args[0]], args=args[1:], prog=f"imagewright tune {args[0]}")
