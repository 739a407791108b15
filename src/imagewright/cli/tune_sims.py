"""`imagewright tune sims MODEL`: the whole SIMS loop on images, once or over self-consuming generations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tyro

from imagewright.cli.composing import experiment_of
from imagewright.cli.console import OUT, bar, pace, say, table
from imagewright.cli.sampling import Changes
from imagewright.cli.scoring import extractor_for, real_images, training_data
from imagewright.cli.train import find_experiment
from imagewright.cli.tune_common import Scoring, Told, require_denoiser
from imagewright.data import open_images
from imagewright.data.config import DataConfig
from imagewright.data.edm_zip import write_edm_zip
from imagewright.files import replacing
from imagewright.guidance import sims as guided_away
from imagewright.metrics import embed
from imagewright.metrics.draws import frechet_of_model
from imagewright.pretrained import find_model, folder_of
from imagewright.samplers.generator import ImageGenerator, sampler_from_json
from imagewright.training.config import EmaConfig
from imagewright.training.distributed import pick_device
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.tuning.sims import Recipe, best_setting, self_consuming
from imagewright.types import UserError


class Images:
    """`tuning.sims`'s recipe for images: models are run folders, data sets are paths. Finished parts are kept."""

    def __init__(self, experiment: Experiment, out: Path, samples: int, budget: int, pollution: float, device: str):
        self.experiment, self.out, self.samples, self.budget = experiment, out, samples, budget
        self.pollution, self.device = pollution, pick_device(device)
        self.recipe: Recipe[str, str] = Recipe(self.train, self.fine_tune, self.draw, self.mix)

    def train(self, data: str, generation: int) -> str:
        """From scratch, by the run's own recipe."""
        return self._run(self._on(data, generation), self.out / f"generation-{generation}")

    def fine_tune(self, model: str, data: str, generation: int) -> str:
        """A copy of the model, trained for the budget in force."""
        return self.fine_tuned(model, data, generation, self.budget)

    def fine_tuned(self, model: str, data: str, generation: int, budget: int) -> str:
        """A copy of the model after `budget` images, with the recipe's rate as it was before its cooldown, constant."""
        training = self.experiment.training
        at = max(training.total_images - training.optimizer.lr_cooldown_images, training.optimizer.lr_ramp_images)
        rate = replace(training.optimizer, lr_cooldown_images=0).lr_at(at, training.total_images)
        optimizer = replace(training.optimizer, lr=rate, lr_ramp_images=0, lr_decay_images=None, lr_cooldown_images=0)
        halflife = min(training.ema.halflife_images, budget / 10)
        tuned = replace(
            self._on(data, generation),
            start=model,
            training=replace(
                training,
                total_images=budget,
                optimizer=optimizer,
                ema=EmaConfig(halflife_images=halflife, rampup_ratio=None),
                seed=training.seed + 1000 + generation,
            ),
        )
        return self._run(tuned, self.out / f"auxiliary-{generation}-{budget}")

    def draw(self, base: str, auxiliary: str | None, omega: float, generation: int) -> str:
        """A zip of labelled samples."""
        path = self.out / f"samples-{generation}{'' if auxiliary is None else f'-omega-{omega:g}'}.zip"
        if not path.exists():
            generator = self.generator(base, auxiliary, omega)
            labels = generator.labels(self.samples, generation)
            drawn: list[npt.NDArray[np.uint8]] = []
            with bar(f"drawing {path.name}", self.samples) as advance_to:
                for batch in generator.batches(self.samples, seed=generation, batch_size=250):
                    drawn.append(batch)
                    advance_to(sum(len(b) for b in drawn))
            names = generator.spec.class_names
            write_edm_zip(
                np.concatenate(drawn), path, labels=None if labels is None else labels.tolist(), classes=names
            )
        return str(path)

    def mix(self, real: str, synthetic: str, generation: int) -> str:
        """All real images and `pollution` times as many synthetic ones."""
        path = self.out / f"polluted-{generation + 1}.zip"
        if not path.exists():
            genuine, made = self._on(real, 0).data.open(), open_images(synthetic, split="all")
            count = min(len(made), round(self.pollution * len(genuine)))
            pictures = [*genuine.images(range(len(genuine))), *made.images(range(count))]
            labelled = bool(genuine.spec.num_classes)
            labels = [int(v) for v in [*genuine.labels, *made.labels[:count]]] if labelled else None
            write_edm_zip(np.stack(pictures), path, labels=labels, classes=genuine.spec.class_names)
        return str(path)

    def generator(self, base: str, auxiliary: str | None, omega: float) -> ImageGenerator:
        """The base model, or it and away from the auxiliary, with the sampler it was saved with."""
        file = find_model(base)
        model = file.model if auxiliary is None else guided_away(file.model, find_model(auxiliary).model, omega)  # type: ignore[arg-type]
        sampler = None if file.sampler is None else sampler_from_json(dict(file.sampler))
        return ImageGenerator(model, file.spec, sampler, self.device, space=file.space)

    def _on(self, data: str, generation: int) -> Experiment:
        """The run's recipe on other data (the run's own data stay as they were configured)."""
        own = self.experiment.data
        source = own if data == own.source else DataConfig(source=data, split="all", labels=own.labels)
        training = replace(self.experiment.training, seed=self.experiment.training.seed + 100 * generation)
        return replace(self.experiment, data=source, training=training)

    def _run(self, experiment: Experiment, folder: Path) -> str:
        total = experiment.training.total_images
        with bar(folder.name, total) as advance_to:
            run_experiment(
                experiment,
                folder,
                device=self.device,
                resume=True,
                on_progress=lambda p: advance_to(p.images, pace(p.loss, p.rate)),
            )
        return str(folder)


def sims(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    samples: int = 10_000,
    budget: tuple[int, ...] = (5_000, 10_000, 20_000),
    omega: tuple[float, ...] = (0.5, 1.0, 1.5),
    generations: int = 1,
    pollution: float = 1.0,
    recipe: str | None = None,
    told: Told = Scoring(seed=1),  # noqa: B008, frozen
) -> None:
    """Train a copy on the model's own samples and move away from it; the same command again goes on where it stopped.

    How long the copy is trained and how far to move are searched together: too short a training gives no direction, too
    long a one leaves the useful one. With --generations above 1: the self-consuming experiment. Each generation is
    trained from scratch on real images polluted by the samples of the one before, plainly and with SIMS (the first
    --budget and --omega); both are measured.

    Args:
        model: run or shipped model to improve.
        out: folder for samples and the auxiliary run.
        samples: images to draw from the model; at least as many as there are real ones.
        budget: images of fine-tuning to try; a few percent of the model's own training.
        omega: strengths to measure; 0 is the model itself.
        generations: 1 improves the model; more run the self-consuming experiment.
        pollution: synthetic images in a generation's data, per real one.
        recipe: of the model, where it is no run folder: edm-emoji64-32.
        told: about the score.
    """
    if told.changes != Changes():
        raise UserError("guidance and skip factors do not go with SIMS, which is a guidance itself")
    if samples < 1 or not budget or min(budget) < 1 or not omega or min(omega) <= 0 or pollution < 0:
        raise UserError(
            f"--samples is {samples}, --budget {budget}, --omega {omega}, --pollution {pollution}; samples and every "
            "budget must be at least 1, every omega above 0, pollution at least 0"
        )
    experiment = find_experiment(recipe) if recipe else experiment_of(folder_of(model))
    file = find_model(model)
    require_denoiser(model, file.model)
    images = Images(experiment, out, samples, budget[0], pollution, told.device)
    source = told.data or training_data(model, file.spec)
    extractor = extractor_for(source, told.inception, pick_device(told.device))
    moments = embed(real_images(model, told.data, file.spec, "all"), extractor).moments

    def score(base: str, auxiliary: str | None, strength: float) -> float:
        return frechet_of_model(images.generator(base, auxiliary, strength), told.n, extractor, moments, seed=told.seed)

    if generations > 1:
        _self_consuming(images, score, omega[0], generations, experiment.data.source, out)
        return
    drawn = images.draw(model, None, 0.0, 0)
    scores: list[tuple[tuple[str, float], float]] = [(("", 0.0), score(model, None, 0.0))]
    rows = table("images of fine-tuning", "omega", "distance (lower is better)")
    rows.add_row("", "0", f"{scores[0][1]:.4g}")
    for images_seen in budget:
        auxiliary = images.fine_tuned(model, drawn, 0, images_seen)
        for strength in omega:
            scores.append(((auxiliary, strength), score(model, auxiliary, strength)))
            rows.add_row(str(images_seen), f"{strength:g}", f"{scores[-1][1]:.4g}")
    OUT.print(rows)
    guide, best = best_setting(scores)
    if best == 0:
        say("no budget and omega are better than the model itself")
    else:
        say(f"use it with: imagewright sample {model} --guidance auto --guide {guide} --weight {1 + best:g}")


def _self_consuming(
    images: Images,
    score: Callable[[str, str | None, float], float],
    omega: float,
    generations: int,
    real: str,
    out: Path,
) -> None:
    rows = table("generation", "plain loop", f"SIMS, omega = {omega:g}")
    columns: list[list[float]] = []
    for name, strength in (("plain", 0.0), ("sims", omega)):
        images.out = out / name
        loop = self_consuming(real, images.recipe, generations, strength)
        columns.append([score(g.base, g.auxiliary, strength) for g in loop])
    lines = ["generation,plain,sims"]
    for g, (plain, guided) in enumerate(zip(*columns, strict=True)):
        rows.add_row(str(g), f"{plain:.4g}", f"{guided:.4g}")
        lines.append(f"{g},{plain},{guided}")
    OUT.print(rows)
    with replacing(out / "generations.csv") as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say(f"written to {out / 'generations.csv'}")
