"""The one face that the command line, the evaluator and the report see: n images of a seed, as uint8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imagewright.checks import require_whole, whole_numbers
from imagewright.data import to_uint8
from imagewright.data.pixels import uint8_later
from imagewright.errors import an
from imagewright.guidance import evaluations
from imagewright.models.discrete_latents import told_latents
from imagewright.models.files import ModelFile
from imagewright.models.kinds import KINDS
from imagewright.models.latents import LatentSpace
from imagewright.models.self_conditioned import carried
from imagewright.models.tokens import check_device
from imagewright.moving import pinned, sent
from imagewright.networks.integers import with_integers
from imagewright.noise import ImageNoise
from imagewright.precision import Drawn, Precision, casts, tf32
from imagewright.samplers import SAMPLERS
from imagewright.samplers.latents_first import STREAM, latents_first
from imagewright.samplers.replay import Replays
from imagewright.shapes import misfit
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, ModelKind, OnStep, Sampler, UserError, kind_of

T = TypeVar("T")
R = TypeVar("R")
Images = npt.NDArray[np.uint8]
Labels = Sequence[int] | npt.NDArray[np.int64]
USUAL: dict[ModelKind, str] = {
    "denoiser": "heun",
    "latent_denoiser": "bit-diffusion",
    "flow_map": "multistep-consistency",
    "token_model": "masked-decoding",
}
"""The sampler of a kind of model, by its name in `SAMPLERS`; a model that needs another says so in `usual_sampler`."""


SMALL = 50_000_000
"""Parameters up to which a model's calls are replayed as CUDA graphs where nothing else is asked for."""


def usual_sampler(model: object) -> Sampler:
    """The sampler, with its usual settings, for a model saved without one. UserError for what draws nothing."""
    kind = kind_of(model)
    if kind not in USUAL:
        raise UserError(f"{an(type(model).__name__)} draws no images; it {KINDS[kind].what}")
    sampler: Sampler = SAMPLERS[getattr(model, "usual_sampler", USUAL[kind])]()
    return sampler


class ImageGenerator:
    """A model, a sampler and what the images are. Image i of seed s depends on (s, i) alone.

    spec: the model's; as an attribute that of the images, which a sampler may draw larger (`expansion`).
    precision: number format of the networks' calls (autocast), or int8: from now on a quantized model multiplies whole
    numbers, on a CPU (`networks.integers`). graphs: whether a CUDA device replays them as graphs
    (`samplers.replay`), which changes no bit; None = where networks are small enough to be held up by their launches.
    space: the latents that the model lives in, from which images are decoded; None = it makes images.
    Raises UserError when the sampler is made for another kind of model, or the device cannot run this one.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DataSpec,
        sampler: Sampler | None = None,
        device: torch.device | str = "cpu",
        *,
        precision: Drawn = "fp32",
        graphs: bool | None = None,
        space: LatentSpace | None = None,
    ) -> None:
        if precision not in get_args(Drawn):
            raise UserError(f"precision is {precision!r}; allowed: {', '.join(get_args(Drawn))}")
        kind = kind_of(model)
        self.sampler = sampler or usual_sampler(model)
        if space is not None and getattr(self.sampler, "clip", False):
            self.sampler = replace(self.sampler, clip=False)  # type: ignore[type-var]  # latents have no range
        drawn_as = "denoiser" if kind == "latent_denoiser" else kind
        if self.sampler.model_kind != drawn_as:
            raise UserError(
                f"sampler {type(self.sampler).__name__} draws from a {self.sampler.model_kind.replace('_', ' ')}; "
                f"this model is {an(kind.replace('_', ' '))}"
            )
        check_device(model, device)
        self.device = torch.device(device)
        # Pixels with their channels together: 10% faster on CPUs, more on GPUs with half precision.
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spec = replace(spec, resolution=spec.resolution * getattr(self.sampler, "expansion", 1))
        if precision == "int8":
            with_integers(self.model)
        self.precision: Precision = "fp32" if precision == "int8" else precision
        self.space = None if space is None else space.eval().to(self.device)
        self.seen = self.spec if space is None else space.spec(spec)
        self._decodes: Any = self.model if kind == "latent_denoiser" else self.space
        self._draws_first = told_latents(self.model) is not None
        small = sum(p.numel() for p in self.model.parameters()) <= SMALL
        wanted = self.device.type == "cuda" and (small if graphs is None else graphs)
        self._replays: AbstractContextManager[Any] = Replays(self.model) if wanted else nullcontext()

    @property
    def latent(self) -> tuple[int, int, int]:
        """Shape of the noise that an image is made of: the image's own, or that of the space of a latent denoiser."""
        shape: tuple[int, int, int] = getattr(self.model, "latent", self.seen.shape)
        return shape

    @property
    def nfe(self) -> int:
        """Network evaluations per image, exactly, a guide's included: the sampler is run on a stand-in that counts."""
        tally = _TokenTally(self.model) if kind_of(self.model) == "token_model" else _Tally(self.model)
        like = torch.zeros(1, *self.latent, dtype=torch.float64)
        self.sampler(tally, like, noise=ImageNoise(0, [0]))
        return tally.total

    @property
    def inversion_nfe(self) -> int:
        """The same of turning an image into noise, by a sampler that can."""
        tally, like = _Tally(self.model), torch.zeros(1, *self.latent, dtype=torch.float64)
        self.sampler.invert(tally, like, noise=ImageNoise(0, [0]))  # type: ignore[attr-defined]
        return tally.total

    @property
    def deterministic(self) -> bool:
        """Whether an image is a function of its latents: the sampler draws nothing on its way."""
        if kind_of(self.model) == "token_model":
            return False
        noise = _Watched(0, [0])
        self.sampler(_Tally(self.model), torch.zeros(1, *self.latent, dtype=torch.float64), noise=noise)
        return not noise.drawn

    def labels(
        self, n: int, seed: int, first: int = 0, shares: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.int64] | None:
        """Classes of images first .. first + n - 1 when none are asked for, from (seed, i) alone; None: has no classes.

        shares: probability of each class, [num_classes]; None = uniform over those that the model saw.
        """
        if not self.spec.num_classes:
            return None
        draw = ImageNoise(seed, range(first, first + n), stream=1).uniform(torch.empty(n, 1, dtype=torch.float64))
        if shares is not None:
            edges = np.cumsum(shares)
            return np.searchsorted(edges / edges[-1], draw[:, 0].numpy(), side="right").astype(np.int64)
        known = np.array([c for c in range(self.spec.num_classes) if c not in self.spec.empty_classes], dtype=np.int64)
        rows = (draw[:, 0] * len(known)).long().numpy().clip(max=len(known) - 1)
        drawn: npt.NDArray[np.int64] = known[rows]
        return drawn

    def batches(
        self,
        n: int,
        *,
        labels: Labels | int | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        on_step: OnStep | None = None,
    ) -> Iterator[Images]:
        """The images of `generate`, batch by batch, so that scoring many need not hold them all."""
        n, batch_size = require_whole("n", n, 1), require_whole("batch_size", batch_size, 1)
        seed, first = require_whole("seed", seed, 0), require_whole("first", first, 0)
        wanted = self._checked_labels(n, labels, seed, first)
        waiting: Callable[[], Images] | None = None
        shares = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
        on_gpu = self.device.type == "cuda"
        begin = partial(self._begin, seed=seed)
        begins = (ahead if on_gpu else map)(begin, ([first + i for i in rows] for rows in shares))
        for rows, start in zip(shares, begins, strict=True):
            told = None if wanted is None else wanted[rows.start : rows.stop]
            begun = uint8_later(self.decoded(self._drawn(*start, told, self._shown(on_step))))
            if not on_gpu:
                yield begun()
                continue
            # The device computes this batch while the host fetches the one before; a thread draws the next one's noise.
            if waiting is not None:
                yield waiting()
            waiting = begun
        if waiting is not None:
            yield waiting()

    def generate(
        self,
        n: int,
        *,
        labels: Labels | int | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        on_step: OnStep | None = None,
    ) -> Images:
        """Images first .. first + n - 1 of a seed, uint8 [n, H, W, C].

        labels: one class for all, or n of them; -1 = unconditional; None = drawn uniformly per image.
        on_step: called after every sampler step of every batch with (x, estimate of x0, sigma).
        Raises UserError for a label the model does not know.
        """
        options = {"labels": labels, "seed": seed, "first": first, "batch_size": batch_size, "on_step": on_step}
        return np.concatenate(list(self.batches(n, **options)))  # type: ignore[arg-type]

    def at(
        self,
        indices: Sequence[int],
        *,
        labels: Labels | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> Images:
        """Given images of a seed in one batch, uint8 [n, H, W, C]; labels: one for each, or None = no condition."""
        return to_uint8(self.decoded(self.drawn(indices, labels=labels, seed=seed, on_step=self._shown(on_step))))

    def drawn(
        self,
        indices: Sequence[int],
        *,
        labels: Labels | None = None,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """What the model makes, before rounding: [n, C, H, W] in [-1, 1], or a little beyond; or what is decoded."""
        if labels is not None:
            labels = self._checked_labels(len(indices), labels, seed, 0)
        return self._drawn(*self._begin(indices, seed), labels, on_step)

    def of_noise(self, begin: Tensor, *, labels: Labels | None = None, seed: int = 0) -> Images:
        """The images of given noise [n, ...] of the shape `latent`, uint8 [n, H, W, C]; labels as in `at`.

        What a sampler draws on its way is that of image 0 of the seed, for all of them. Raises UserError for a token
        model, which begins with no noise.
        """
        if kind_of(self.model) == "token_model":
            raise UserError("a token model begins with no noise that an image could be drawn from")
        if labels is not None:
            labels = self._checked_labels(len(begin), labels, seed, 0)
        noise, first, own = self._begin([0] * len(begin), seed)
        if begin.shape != own.shape:
            raise UserError(f"noise of shape {list(begin.shape[1:])} was given; this model's is {list(own.shape[1:])}")
        return to_uint8(self.decoded(self._drawn(noise, first, begin, labels, None)))

    def inverted(self, seen: Tensor, cond: Condition, *, noise: ImageNoise, on_step: OnStep | None = None) -> Tensor:
        """The noise of which the sampler, one that can be run backwards, would make what the model sees."""
        with tf32(False), casts(self.precision, self.device), self._replays:
            found: Tensor = self.sampler.invert(  # type: ignore[attr-defined]
                carried(self.model), seen, cond, noise=noise, on_step=on_step
            )
            return found

    def encoded(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] in [-1, 1] as the model sees them, on its device: themselves, or their mean latents."""
        there = images.to(self.device)
        with tf32(False):
            return there if self.space is None else self.space.encode(there)

    def decoded(self, made: Tensor) -> Tensor:
        """What the model makes, as images [n, C, H, W] in [-1, 1]."""
        with tf32(False):
            return made if self._decodes is None else self._decodes.decode(made)

    def _shown(self, on_step: OnStep | None) -> OnStep | None:
        """on_step, told of images where the model makes something else."""
        return on_step if on_step is None or self._decodes is None else partial(_decoded, self._decodes, on_step)

    def _begin(self, indices: Sequence[int], seed: int) -> tuple[ImageNoise, ImageNoise | None, Tensor]:
        """The images' noise, that of what is drawn first, and what sampling begins with, still on the host."""
        noise = ImageNoise(seed, indices)
        begin = pinned(noise.normal(torch.empty(len(indices), *self.latent)), self.device)
        return noise, ImageNoise(seed, indices, STREAM) if self._draws_first else None, begin

    def _drawn(
        self,
        noise: ImageNoise,
        first: ImageNoise | None,
        latents: Tensor,
        labels: Labels | None,
        on_step: OnStep | None,
    ) -> Tensor:
        latents = sent(latents, self.device)
        cond = Condition()
        if labels is not None:
            cond = Condition(label=sent(pinned(torch.as_tensor(labels), self.device), self.device))
        with tf32(False), casts(self.precision, self.device), self._replays:
            if first is not None:
                cond = latents_first(self.model, len(latents), cond, first)
            return self.sampler(carried(self.model), latents, cond, noise=noise, on_step=on_step)

    def _checked_labels(
        self, n: int, labels: Labels | int | None, seed: int, first: int
    ) -> npt.NDArray[np.int64] | None:
        if labels is None:
            return self.labels(n, seed, first)
        array = whole_numbers("labels", labels)
        array = np.full(n, array) if array.ndim == 0 else array
        if array.shape != (n,):
            raise UserError(f"{array.size} labels were given for {n} images; give one for each, or one for all")
        if array.min() < -1 or array.max() >= self.spec.num_classes:
            bad = array[(array < -1) | (array >= self.spec.num_classes)][0]
            allowed = f"0 to {self.spec.num_classes - 1}, or -1" if self.spec.num_classes else "-1 (it has no classes)"
            raise UserError(f"label {bad} is not known to this model; allowed: {allowed}")
        return array


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function(item) of each in turn; a thread computes the next while the caller has the last."""
    waiting: Future[R] | None = None
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            begun = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = begun
        if waiting is not None:
            yield waiting.result()


def _decoded(space: Any, on_step: OnStep, x: Tensor, x0: Tensor, sigma: float) -> None:
    """What a sampler sees in another space, shown as images."""
    on_step(space.decode(x), space.decode(x0), sigma)


class _Tally:
    """Answers zeros for a model, and adds up what each call would have cost."""

    def __init__(self, model: Any) -> None:
        self.model, self.total = model, 0
        self.sigma_min, self.sigma_max = model.sigma_min, model.sigma_max
        if hasattr(model, "initial"):  # a flow of constant acceleration is asked for its two parts
            self.initial = self.acceleration = self._single

    def __call__(self, x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        self.total += evaluations(self.model, float(sigma[0]))
        return torch.zeros_like(x)

    def _single(self, x: Tensor, *rest: Any) -> Tensor:
        self.total += 1
        return torch.zeros_like(x)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        rounded: Tensor = self.model.round_sigma(sigma)
        return rounded


class _Watched(ImageNoise):
    """Knows whether it was ever asked."""

    drawn = False

    def _draw(self, like: Tensor, fill: str) -> Tensor:
        self.drawn = True
        return super()._draw(like, fill)


class _TokenTally:
    """The same for a token model: evenly distributed tokens, each call one evaluation, however many places it answers.

    What else a sampler asks of it (a schedule, say) is the model's own.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.total = model, 0
        self.codec = _NoCodec(model.codec.values, model.codec.length)
        if hasattr(model, "step"):
            self.start, self.step = self._start, self._step
        if hasattr(model, "ask"):
            self.start, self.show, self.ask = self._start, self._show, self._ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        self.total += 1
        return torch.zeros(*tokens.shape, self.codec.values)

    def _start(self, cond: Condition, n: int, expansion: int = 1) -> int:
        return n

    def _step(self, before: Tensor | None, cache: int) -> Tensor:
        self.total += 1
        return torch.zeros(cache, self.codec.values)

    def _show(self, tokens: Tensor, places: Tensor, cache: int, *, causal: bool) -> None:
        """Belongs to the evaluation that asks."""

    def _ask(self, places: Tensor, cache: int) -> Tensor:
        self.total += cache  # with guidance of one image there are two sequences
        return torch.zeros(*places.shape, self.codec.values)


class _NoCodec:
    """Stands in for a codec whose network need not be asked for an image."""

    def __init__(self, values: int, length: int) -> None:
        self.values, self.length = values, length

    def decode(self, tokens: Tensor, expansion: int = 1) -> Tensor:
        return tokens


def sampler_to_json(sampler: Sampler) -> dict[str, Any]:
    """A sampler's name and settings; infinity is written as a string."""
    names = {cls: name for name, cls in SAMPLERS.items()}
    settings = asdict(sampler)  # type: ignore[call-overload]
    return {"class": names[type(sampler)]} | {k: str(v) if v == float("inf") else v for k, v in settings.items()}


def sampler_from_json(value: dict[str, Any]) -> Sampler:
    """Inverse of `sampler_to_json`; raises UserError for a name or setting this version does not know."""
    settings = {k: tuple(v) if isinstance(v, list) else float(v) if v == "inf" else v for k, v in value.items()}
    name = settings.pop("class", None)
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UserError(f"the model asks for sampler {name!r}; this version has {', '.join(SAMPLERS)}")
    kind = SAMPLERS[name]
    hints = get_type_hints(kind)
    faults = (misfit(v, hints[k], k, finite=False) for k, v in settings.items() if k in hints)
    fault = next((fault for fault in faults if fault is not None), None)
    if fault is not None:
        raise UserError(f"sampler {name!r}: {fault}")
    try:
        sampler: Sampler = kind(**settings)
    except TypeError as error:
        raise UserError(f"sampler {name!r}: {error}") from None
    return sampler


def generator_from(
    file: ModelFile,
    sampler: Sampler | None = None,
    device: torch.device | str = "cpu",
    *,
    precision: Drawn = "fp32",
) -> ImageGenerator:
    """A model read from disk with a sampler, or with the one it was saved with."""
    if sampler is None and file.sampler is not None:
        sampler = sampler_from_json(dict(file.sampler))
    return ImageGenerator(file.model, file.spec, sampler, device, precision=precision, space=file.space)
