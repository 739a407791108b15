"""Bits per dimension of real images under a model, whatever kind it is, and how sure the number is.

exact      a causal token model on a lossless codec: the sum of its log-probabilities.
bound      a model that draws an upper bound of -log p (masked diffusion, random orders). `passes` times over all
           images, the bound's times spread evenly over each pass (i/n + u mod 1, in an order of its own); the standard
           error is that of the mean over passes.
probability flow
           a denoiser, or the denoiser within a trajectory model: `metrics.likelihood` at images that are spread
           uniformly over the bins of their 8-bit values (dequantised), which bounds the discrete likelihood from
           above in expectation; trace by Hutchinson's estimate, or exact. What is drawn (dequantisation, probes) is
           drawn anew in each pass; the standard error comes from the differences between passes, image by image.
           Of a denoiser with discrete latents (`models.discrete_latents`): given the image's likeliest ones, to which
           their own are added, -ln p(x) <= -ln p(x | z) - ln p(z).

A flow map that contains no denoiser has no likelihood, neither has a masked model that is no diffusion; the tokens of a
codec that loses something say nothing of pixels. Each of these is refused in a sentence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imagewright.data import ImageSet, from_uint8
from imagewright.errors import an
from imagewright.metrics.likelihood import bits_per_dim, dequantised, log_likelihood
from imagewright.models.discrete_latents import LatentDenoiser, told_latents
from imagewright.models.kinds import KINDS
from imagewright.models.self_conditioned import is_self_conditioned
from imagewright.noise import ImageNoise
from imagewright.precision import tf32
from imagewright.types import Condition, DataSpec, Denoiser, LikelihoodModel, UserError, kind_of
from imagewright.version import versions

BitsKind = Literal["exact", "bound", "probability flow"]
USUAL_PASSES: dict[BitsKind, int] = {"exact": 1, "bound": 8, "probability flow": 2}
TIMES, ORDER, DRAWS = 2, 3, 4
"""Streams of `ImageNoise`: 0 and 1 belong to sampling; pass r of an image draws from DRAWS + r."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BitsSettings:
    """How bits per dimension are measured; what a kind of model has no use for is left out of its report."""

    passes: int | None = None
    """How often all that is random is drawn; default 8 for a bound, 2 for the probability flow."""
    ode_steps: int = 64
    """Of the probability flow: Runge-Kutta steps of order 4, four network evaluations each."""
    probes: int = 1
    """Of the probability flow: random signs per image in the estimate of the trace; 0 = the exact trace."""

    def __post_init__(self) -> None:
        if self.passes is not None and self.passes < 1:
            raise UserError(f"passes is {self.passes}; it must be at least 1")
        if self.ode_steps < 1:
            raise UserError(f"ode-steps is {self.ode_steps}; it must be at least 1")
        if self.probes < 0:
            raise UserError(f"probes is {self.probes}; it must be at least 1, or 0 for the exact trace")


@dataclass(frozen=True, kw_only=True)
class BitsReport:
    """Bits per dimension and all that they depend on.

    bpd:       mean over the images. kind: what it is; a bound and the probability flow's are no less than the truth.
    stderr:    standard error of what was drawn at random, given these images; None for exact values and one pass.
    spread:    standard error over the images, were they drawn from a larger set; None for one image.
    per_class: whether the model was told each image's class.
    seconds:   of the model's part.
    """

    bpd: float
    kind: BitsKind
    stderr: float | None
    spread: float | None
    num_images: int
    image_shape: tuple[int, int, int]
    data: str
    split: str
    preprocessing: str
    per_class: bool
    seed: int
    settings: Mapping[str, Any]
    reference: str
    notes: tuple[str, ...]
    seconds: float
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@tf32(False)
def measure_bits(
    model: Any,
    spec: DataSpec,
    images: ImageSet,
    *,
    split: str,
    settings: BitsSettings | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> BitsReport:
    """Bits per dimension of images under a model; each value depends on (seed, its image's index, the set's size).

    spec: the model's. split: which part of the data the images are, for the report. on_progress: called with
    (images times passes done, of how many). Raises UserError for a model that has no likelihood, or images that are not
    the model's.
    """
    settings = settings or BitsSettings()
    scored = scorer(model)
    _check_settings(scored.kind, settings)
    _check_images(spec, images)
    passes = USUAL_PASSES[scored.kind] if settings.passes is None else settings.passes
    started = time.monotonic()
    nats = _nats(scored, spec, images, passes, settings, seed, batch_size, torch.device(device), on_progress)
    seconds = time.monotonic() - started
    bits = nats / (math.prod(spec.shape) * math.log(2))
    return BitsReport(
        bpd=float(bits.mean()),
        kind=scored.kind,
        stderr=standard_error(bits, scored.kind),
        spread=float(bits.mean(0).std()) / math.sqrt(len(images)) if len(images) > 1 else None,
        num_images=len(images),
        image_shape=(spec.resolution, spec.resolution, spec.channels),
        data=images.source,
        split=split,
        preprocessing=f"{images.preprocessing}, 8-bit values" + scored.preprocessing,
        per_class=spec.num_classes > 0,
        seed=seed,
        settings=_used(scored, passes, settings),
        reference=f"images:{images.fingerprint}",
        notes=_notes(scored, spec),
        seconds=seconds,
        versions=versions(),
    )


def standard_error(bits: Tensor, kind: BitsKind) -> float | None:
    """Of the mean of bits [passes, n], given the images; None where nothing is drawn or one pass cannot tell."""
    passes, n = bits.shape
    if kind == "exact" or passes < 2:
        return None
    if kind == "bound":  # the times of a pass are spread over its images, which are therefore not independent
        return float(bits.mean(1).std()) / math.sqrt(passes)
    return math.sqrt(float(bits.var(0).sum()) / passes) / n


# --- what a model answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A model of which bits can be asked: as a `LikelihoodModel` or as a `Denoiser`."""

    kind: BitsKind
    model: Any
    preprocessing: str = ""

    @property
    def told(self) -> LatentDenoiser | None:
        """The model within that is told discrete latents."""
        return told_latents(self.model)


def scorer(model: Any) -> Scorer:
    """How a model's likelihood is computed. Raises UserError, in one sentence, for one that has none."""
    name, kind = type(model).__name__, kind_of(model)
    if KINDS[kind].answers:
        raise UserError(f"{an(name)} {KINDS[kind].what}; it gives images no probability")
    if kind == "token_model":
        # Not by isinstance: from Python 3.12 on that does not see what a module holds as a submodule, such as a codec.
        if not hasattr(model, "nll"):
            raise UserError(
                f"{an(name)} has no likelihood: it was trained to fill in tokens, not to bound the probability of all"
            )
        if not model.codec.lossless:
            raise UserError(
                f"the tokens of {type(model.codec).__name__} do not hold all of an image, so their likelihood says "
                "nothing in bits per dimension of pixels; bpd needs a model on a lossless codec, such as pixels"
            )
        return Scorer(model.likelihood, model)
    if kind == "latent_denoiser":
        raise UserError(
            f"{an(name)} has no likelihood of images: it denoises {model.space} as real numbers, whose density is not "
            "the probability of what they are rounded to; measure distances of its samples"
        )
    if is_self_conditioned(model):
        raise UserError(
            f"a self-conditioned {name} has no likelihood: what it says at a point depends on what it said before, so "
            "it follows no flow; measure distances of its samples"
        )
    if kind == "flow_map":
        contained = getattr(model, "denoiser", None)
        if contained is None:
            raise UserError(
                f"{an(name)} jumps along the flow and contains no denoiser, so it has no likelihood; measure its "
                "teacher"
            )
        model = contained()
    return Scorer("probability flow", model, ", dequantised uniformly over their bins")


def _nats(
    scored: Scorer,
    spec: DataSpec,
    images: ImageSet,
    passes: int,
    settings: BitsSettings,
    seed: int,
    batch_size: int,
    device: torch.device,
    on_progress: OnProgress | None,
) -> Tensor:
    """-ln p of every image in every pass, float64 [passes, n] on the CPU; the density of flows made discrete."""
    n = len(images)
    if isinstance(scored.model, torch.nn.Module):
        scored.model.eval().to(device)
    found = torch.zeros(passes, n, dtype=torch.float64)
    for r in range(passes):
        times = spread_times(n, seed, r).to(device)
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            x = from_uint8(images.images(rows)).to(device)
            labels = torch.as_tensor(images.labels[rows.start : rows.stop], device=device)
            cond = Condition(label=labels) if spec.num_classes else Condition()
            noise = ImageNoise(seed, rows, DRAWS + r)
            found[r, rows.start : rows.stop] = _answer(scored, x, cond, noise, times[rows], settings).cpu()
            if on_progress is not None:
                on_progress(r * n + rows.stop, passes * n)
    return found


def _answer(
    scored: Scorer, x: Tensor, cond: Condition, noise: ImageNoise, times: Tensor, settings: BitsSettings
) -> Tensor:
    if scored.kind != "probability flow":
        model: LikelihoodModel = scored.model
        with torch.no_grad():
            return model.nll(model.codec.encode(x), cond, noise=noise, times=times)
    denoiser: Denoiser = scored.model
    dimension = x[0].numel()
    cond, latents = (cond, 0.0) if scored.told is None else scored.told.recognised(x, cond)
    spread = dequantised(x.double(), noise)
    density = log_likelihood(
        denoiser, spread, cond, noise=noise, steps=settings.ode_steps, probes=settings.probes or None
    )
    return bits_per_dim(density, dimension) * dimension * math.log(2) + latents


def spread_times(n: int, seed: int, pass_: int) -> Tensor:
    """n numbers in [0, 1), float64: evenly spaced from a random start, in a random order."""
    one = torch.zeros(1, 1, dtype=torch.float64)
    start = float(ImageNoise(seed, [pass_], TIMES).uniform(one))
    order = ImageNoise(seed, [pass_], ORDER).uniform(one.expand(1, n)).argsort()[0]
    return (order.double() / n + start) % 1


# --- what the number depends on -----------------------------------------------------------------------------


USES: dict[BitsKind, tuple[str, ...]] = {
    "exact": (),
    "bound": ("passes",),
    "probability flow": ("passes", "ode_steps", "probes"),
}
"""The settings that have an effect."""


def _check_settings(kind: BitsKind, settings: BitsSettings) -> None:
    usual = BitsSettings()
    for name, value in asdict(settings).items():
        if name not in USES[kind] and value != getattr(usual, name):
            raise UserError(f"{name.replace('_', '-')} is {value}; it has no effect on {_said(kind)}")


def _said(kind: BitsKind) -> str:
    return {"exact": "an exact likelihood", "bound": "a bound", "probability flow": "the probability flow"}[kind]


def _check_images(spec: DataSpec, images: ImageSet) -> None:
    if not len(images):
        raise UserError("there are no images to score")
    if images.spec.shape != spec.shape:
        raise UserError(f"images are {list(images.spec.shape)} (channels, height, width), the model's {[*spec.shape]}")
    if not spec.num_classes:
        return
    unknown = images.labels[(images.labels < 0) | (images.labels >= spec.num_classes)]
    if len(unknown):
        raise UserError(
            f"the model is told each image's class, 0 to {spec.num_classes - 1}; {images.source} has images of class "
            f"{int(unknown[0])} (-1: none)"
        )


def _used(scored: Scorer, passes: int, settings: BitsSettings) -> dict[str, Any]:
    if scored.kind == "exact":
        return {}
    if scored.kind == "bound":
        return {"passes": passes}
    return {
        "passes": passes,
        "ode_steps": settings.ode_steps,
        "trace": f"Hutchinson, probes: {settings.probes}" if settings.probes else "exact",
        "dequantisation": "uniform",
        "sigma_min": scored.model.sigma_min,
        "sigma_max": scored.model.sigma_max,
    }


def _notes(scored: Scorer, spec: DataSpec) -> tuple[str, ...]:
    said = {
        "exact": (),
        "bound": ("a bound: the model's own bits per dimension are no more than this, within the standard error",),
        "probability flow": (
            "the density at dequantised images bounds the bits per dimension of the 8-bit values from above",
        ),
    }[scored.kind]
    if scored.told is not None and scored.told.prior is not None:
        said = (*said, "of all latents that an image may have its likeliest alone are counted: an upper bound, too")
    own: str | None = getattr(scored.model, "likelihood_note", None)
    classes = "every image's class is told to the model and not counted" if spec.num_classes else None
    return tuple(note for note in (*said, own, classes) if note is not None)
