"""`imagewright tune lcsc RUN`: a linear combination of a run's kept weights, searched for the sampler of use."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from imagewright.cli.console import bar, say
from imagewright.cli.sampling import make_sampler
from imagewright.cli.tune_common import Scorer, Scoring, Told, fresh, print_scores, save
from imagewright.models.files import ModelFile
from imagewright.pretrained import folder_of
from imagewright.samplers.generator import sampler_from_json, sampler_to_json, usual_sampler
from imagewright.training.checkpoint import require_fit
from imagewright.training.weights import Combinations, combine, stored
from imagewright.tuning.lcsc import LCSC, Vector, choose_weights, search
from imagewright.types import Sampler, UserError


def lcsc(
    run: Annotated[Path, tyro.conf.Positional],
    out: Path,
    sampler: str | None = None,
    steps: int | None = None,
    set: tuple[str, ...] = (),  # the option's name
    until: int | None = None,
    window: int | None = None,
    spacing: int | None = None,
    evaluations: int = 300,
    told: Told = Scoring(),  # noqa: B008, frozen
) -> None:
    """Search a linear combination of the raw weights that a run kept, for the very sampler you will draw with.

    Runs on every kind of model: consistency models in one step (the paper's first use), denoisers in few.

    Args:
        run: a run trained with --training.weights-images.
        out: model folder to write.
        sampler: that the combination is searched for, as in `sample`; it suits no other as well. Default the run's own.
        steps: number of sampler steps; 5 to 10 are where a denoiser gains.
        set: further sampler settings, name=value.
        until: newest weights to use, in images of training; default the last kept.
        window: images of training between the oldest and the newest weights; default all that were kept.
        spacing: least images of training between two; default as they were kept.
        evaluations: candidates to measure (published: about 2000).
        told: about the score (published: 5000 images for each candidate).
    """
    file = fresh(run, out)
    chosen, images = _chosen(run, until, window, spacing)
    drawn_by = make_sampler(file, sampler, steps, set) or _own(file)
    weights = Combinations(chosen)
    require_fit(weights.first, file.model.state_dict(), str(chosen[0]))
    scorer, candidate = Scorer.of(str(run), file, told), copy.deepcopy(file.model)
    size = f"{weights.bytes / 2**30:.2g} GiB of differences"
    where = "in memory" if weights.held else "too many: the files are read for each candidate"
    say(f"{len(chosen)} weights, kept after {images[0]} to {images[-1]} images ({size}, {where})")

    def combined(alpha: Vector) -> nn.Module:
        candidate.load_state_dict(weights(alpha))
        return candidate

    with bar("candidates", evaluations, "candidates") as advance_to:
        found = search(
            len(chosen),
            lambda alpha: scorer.score(combined(alpha), file, drawn_by),
            LCSC(evaluations=evaluations, seed=told.seed),
            lambda k, best: advance_to(k, f"{best:.4g}"),
        )
    average = found.best_average_coefficients
    assert average is not None
    kinds = {"best average": average, "LCSC": found.coefficients}
    searched = {"best average": found.best_average, "LCSC": found.fitness}
    anew = {name: scorer.score(combined(alpha), file, drawn_by, told.seed + 1) for name, alpha in kinds.items()}
    print_scores("weights, on the search's images", searched)
    print_scores("weights, on images of another seed", anew)
    origin = {
        "sampler": sampler_to_json(drawn_by),
        "images": images,
        "coefficients": found.coefficients.tolist(),
        "searched": searched,
        "anew": anew,
    }
    tuned = replace(file, sampler=origin["sampler"])
    save(tuned, combine(chosen, found.coefficients.tolist()), out, {"lcsc": origin})


def _chosen(run: Path, until: int | None, length: int | None, spacing: int | None) -> tuple[list[Path], list[int]]:
    """Files of the weights to combine, oldest first, and the images of training after which each was kept."""
    kept = stored(folder_of(run), "raw")
    if not kept:
        raise UserError("there are no stored weights; train with --training.weights-images")
    indices = choose_weights([s.images for s in kept], until, length, spacing)
    return [kept[i].path for i in indices], [kept[i].images for i in indices]


def _own(file: ModelFile) -> Sampler:
    """The sampler that the model was saved with, or its kind's usual one."""
    return usual_sampler(file.model) if file.sampler is None else sampler_from_json(dict(file.sampler))
