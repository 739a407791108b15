"""The words every part of the library shares: conditions, data specifications, model protocols, updates.

Nothing here knows a network, a paper or a file; everything else may import this module (and `UserError` from it).

Conventions   images are float32 NCHW in [-1, 1]; sigma is the noise's standard deviation in data units, one number per
              image, shape [N]; labels are int64 [N], -1 meaning "no class".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.errors import UserError as UserError
from imagewright.errors import an as an


@dataclass(frozen=True)
class Example:
    """The base of batches: frozen dataclasses of tensors, or of further examples, with one row per example or None.

    A data set yields one kind of them, the trainer moves them and knows none, and a method says with the annotation of
    its step's `batch` which kind it learns from.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor that is present: `batch.map(lambda t: t.to(device))`."""
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changed[name] = function(value)
            elif isinstance(value, Example):
                changed[name] = value.map(function)
        return replace(self, **changed) if changed else self

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return self.map(lambda t: t[rows])


@dataclass(frozen=True, kw_only=True)
class Condition(Example):
    """What a model is told besides the noisy image. Every entry has one row per image, or is None.

    label:   int64 [N], class index, -1 = unconditional.
    augment: float32 [N, A], parameters of the training augmentation; None (= zeros) when sampling.
    destination: float32 [N], noise label of the level to which a flow map shall go; set by the map, not by its caller.
    share: float32 [N] in [0, 1], of real images in the mixture of real and generated ones that is asked about, for
    networks that are told it (`networks.mixture`); None = one half.
    weight: float32 [N], strength of the guidance that a student is to draw with (`models.weighted`), 1 = none;
    None = the model's own.
    estimate: [N, C, H, W], an earlier answer to the same question, for self-conditioned networks
    (`models.self_conditioned`); None = zeros, there is none yet.
    latents: float32 [N, M, D], vectors of the image's discrete latents, which a model draws before it is
    sampled from (`models.discrete_latents`); None = no latents.
    """

    label: Tensor | None = None
    augment: Tensor | None = None
    destination: Tensor | None = None
    share: Tensor | None = None
    weight: Tensor | None = None
    estimate: Tensor | None = None
    latents: Tensor | None = None


UNCONDITIONAL = Condition()


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What kind of images a data set holds and a model makes: the part of both that has to agree.

    empty_classes: of a model, the classes of which it saw no picture in training; they are drawn only where asked for.
    """

    name: str
    resolution: int
    channels: int
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        return (self.channels, self.resolution, self.resolution)

    @property
    def known_classes(self) -> tuple[int, ...]:
        """Classes of which there are pictures."""
        return tuple(k for k in range(self.num_classes) if k not in self.empty_classes)


@dataclass(frozen=True)
class Coupling(Example):
    """Noise and the images that a teacher makes of it: latents (standard normal) and images, both [N, C, H, W].

    points: where the teacher's trajectories pass at some times of the straight path, x_t [N, T, C, H, W]; times: these
    times, [N, T], the same in every row. None where the store has none.
    """

    latents: Tensor
    images: Tensor
    cond: Condition = UNCONDITIONAL
    points: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Batch(Example):
    """Labelled pictures: training images, float32 [N, C, H, W] in [-1, 1], and what is known about them.

    coupling: as many pairs of noise and image, where the run has a store of them (`data.couplings`).
    """

    images: Tensor
    cond: Condition = UNCONDITIONAL
    coupling: Coupling | None = None


class Examples(Protocol):
    """A data set: N examples of one kind, read by index."""

    @property
    def spec(self) -> DataSpec:
        """What its images are, as far as it has any."""
        ...

    @property
    def source(self) -> str:
        """Where it came from, in words."""
        ...

    @property
    def example(self) -> type[Example]:
        """Which kind of batch it yields."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what it holds, equal for equal content in any container."""
        ...

    @property
    def in_memory(self) -> bool:
        """False when every `read` decodes files; then the loader reads ahead."""
        ...

    def __len__(self) -> int: ...

    def read(self, rows: npt.NDArray[np.int64]) -> Any:
        """Examples by index as arrays, however the set likes them best; in other threads or processes."""
        ...

    def batch(self, read: Any, rows: npt.NDArray[np.int64], chance: Chance) -> Example:
        """A batch of tensors on the CPU. chance(): uniform on [0, 1), [n], of places in the endless sequence."""
        ...

    def prepared(self, batch: Any) -> Example:
        """The batch as methods are given it, on the device to which it was moved; most return it as it is."""
        ...


@runtime_checkable
class Offering(Protocol):
    """A data set that has more for methods than its batches."""

    @property
    def offers(self) -> Mapping[str, Any]:
        """What its methods may ask for by name, beside the specification."""
        ...


Chance = Callable[[], npt.NDArray[np.float64]]

ModelKind = Literal["denoiser", "latent_denoiser", "flow_map", "token_model", "codec", "autoencoder", "encoder"]
"""What a model on disk may be. `KINDS` in `models.kinds` says what each offers and what the commands do with it."""


def kind_of(model: object) -> ModelKind:
    """Which of the protocols a model meets: what its class says in `kind`; a denoiser where it says nothing."""
    kind: ModelKind = getattr(model, "kind", "denoiser")
    return kind


@runtime_checkable
class Denoiser(Protocol):
    """E[x0 | x] for x = x0 + sigma * eps; score and velocity follow from it (see `paths`).

    sigma_min, sigma_max: the noise levels for which it was made (what a sampler may ask for).
    """

    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, C, H, W]; sigma: [N], > 0. Returns the estimate of x0, shape and dtype of x."""
        ...

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level the denoiser knows; the identity unless it was trained on a table (iDDPM)."""
        ...


@runtime_checkable
class LatentDenoiser(Denoiser, Protocol):
    """A denoiser in another space than the images': of their bits, say. Every sampler of denoisers draws from it.

    latent: shape of what it denoises, [C, H, W].
    """

    latent: tuple[int, int, int]

    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> what is denoised, [N, *latent]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse, of anything near what is denoised; float32 [N, C, H, W] in [-1, 1]."""
        ...


@runtime_checkable
class FlowMap(Protocol):
    """A jump along the probability-flow ODE: the point at `sigma_to` of the trajectory through x at `sigma`.

    A consistency model answers for sigma_to = 0 only and raises ValueError otherwise.
    """

    sigma_min: float
    sigma_max: float

    def __call__(self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, C, H, W]; sigma, sigma_to: [N]. Returns [N, C, H, W], dtype of x."""
        ...


@runtime_checkable
class KnowsNoise(Protocol):
    """A flow map that has learnt which noise belongs to an image, for samplers that put noise back."""

    def noise_of(self, images: Tensor, fresh: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """Noise of images, of unit level, from fresh standard normal noise; all [N, C, H, W]."""
        ...


class Codec(Protocol):
    """Images as tokens and back. Tokens are int64 [N, length], 0 .. values - 1, in raster order.

    lossless: decode(encode(images)) is the images, when these are on the 256 levels of 8-bit pictures.
    """

    values: int
    length: int
    lossless: bool

    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> tokens."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> [N, C, H, W] in [-1, 1], float32."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """What may stand at each place of a sequence of tokens, given those that the model is shown.

    order: "masked", it answers from all tokens that are not `codec.values`, which stands for an unknown one; or
    "causal", it answers at every place from the places before.
    """

    codec: Codec
    order: Literal["masked", "causal"]

    def logits(self, tokens: Tensor, cond: Condition = UNCONDITIONAL, time: Tensor | None = None) -> Tensor:
        """tokens: [N, length]; time: [N] in [0, 1], the share of masked places, for models that are told it.

        Returns [N, length, values], float32 or wider.
        """
        ...


class Autoencoder(Protocol):
    """Images as latents and back: another space for denoisers, maps and flows to live in.

    latent: shape of one image's latents, [C, H, W].
    """

    latent: tuple[int, int, int]

    def encode(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> latents [N, *latent]; the mean, or with noise a draw, of what the encoder says."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> [N, C, H, W] in [-1, 1]."""
        ...


class Encoding(NamedTuple):
    """What an encoder makes of images.

    pooled: [N, D]. tokens: [N, h w, D'], in raster order, None = it has none; grid: (h, w). logits: [N, K] of its
    classes, None = it has none. taught: [N, K], in training, of a second head that learns from a teacher.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    logits: Tensor | None = None
    taught: Tensor | None = None


Resize = Literal["box", "bicubic", "tensorflow"]


@dataclass(frozen=True, kw_only=True)
class View:
    """How an encoder's network sees pictures; a part of its file.

    side: height and width. channels: 1, 3, or of frames of events 2; grey pictures repeat theirs. resize: box = means
    over boxes or repeated pixels, where no size divides the other bilinear, antialiased; bicubic = antialiased, and cut
    to [-1, 1]; tensorflow = bilinear as TensorFlow 1's, of pixels at their corners, not antialiased. mean, std:
    subtracted and divided by, of colours in [0, 1], one number or one for each channel.
    """

    side: int
    channels: int
    resize: Resize = "box"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


class Encoder(Protocol):
    """Images as features: what judges, teaches, conditions and curates generators."""

    view: View

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1], brought to the view whatever their size -> float32 or wider; differentiable."""
        ...


@runtime_checkable
class LikelihoodModel(Protocol):
    """A token model that also says how probable an image's tokens are.

    likelihood: "exact"; or "bound", and then `nll` is a draw whose mean is no less than the exact value.
    """

    codec: Codec
    likelihood: Literal["exact", "bound"]

    def nll(
        self,
        tokens: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """-ln p(tokens), in nats, float64 [N].

        noise: what a bound draws from. times: [N] in [0, 1), in place of the uniform numbers from which a bound takes
        its times, for callers that spread them evenly over a whole set of images.
        """
        ...


class Noise(Protocol):
    """A source of randomness that is handed in, so that no module draws from a hidden global one."""

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal of `like`'s shape, dtype and device; the leading axis counts images."""
        ...

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1) of `like`'s shape, dtype and device."""
        ...


OnStep = Callable[[Tensor, Tensor, float], None]
"""Called by a sampler after each step with (x, x0 estimate, sigma of x)."""


class Sampler(Protocol):
    """A way to draw: a frozen dataclass of settings with `__call__`. It knows the protocols only.

    `model_kind` says which protocol the first argument must meet. What an image costs may depend on the model, as in
    raster order: `ImageGenerator.nfe` counts it.
    """

    model_kind: ClassVar[ModelKind]

    def __call__(
        self,
        model: Any,
        /,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """latents: standard normal [N, C, H, W], scaled to the first noise level inside.

        noise: source of every further draw; required by stochastic settings. Returns x0, [N, C, H, W].
        """
        ...


class CountedSampler(Sampler, Protocol):
    """A sampler whose settings alone say what it costs."""

    @property
    def nfe(self) -> int:
        """Network evaluations per image, exactly."""
        ...


class Generator(Protocol):
    """The one face that the command line, the evaluator and the report see, whatever the model is."""

    spec: DataSpec

    def generate(
        self, n: int, *, labels: np.ndarray | None = None, seed: int = 0, first: int = 0, batch_size: int = 64
    ) -> np.ndarray:
        """Images `first` .. `first + n - 1` of a seed, uint8 [n, H, W, C]; image i depends on (seed, i) alone."""
        ...


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Where a run stands. The unit of training is the image seen, so a batch-size change moves no schedule."""

    step: int
    images: int
    total_images: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.images / self.total_images


Span = int | float
"""How long something lasts, in fields named `..._images`: from 1 on a number of images, below 1 a share of the run."""


@dataclass(frozen=True)
class Update:
    """ "Take one optimiser step of `part` along this loss": what a method yields to the trainer.

    loss:  [N], one number per image, before any reduction; the trainer averages.
    parts: further numbers to log, each [N] or a scalar, detached by the trainer.
    at:    sigma [N] of each image, so that the log can show the loss by noise level.
    rate:  learning rate of this step, in units of the part's: for methods with a schedule of their own.
    """

    part: str
    loss: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    at: Tensor | None = None
    rate: float = 1.0


@dataclass(frozen=True)
class Follow:
    """ "Move `part` towards `of`": part <- decay * part + (1 - decay) * of, for targets that are averages."""

    part: str
    of: str
    decay: float


@dataclass(frozen=True)
class Restart:
    """ "Let the optimiser of `part` begin anew": it forgets its moments and its count of steps."""

    part: str


Event = Update | Follow | Restart


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network that learns: it gets an optimiser, and averages (EMA) when `ema` is set.

    lr_scale: its learning rate, in units of the run's. betas: its optimiser's, where they are not the run's.
    groups: of a weight, by its name and itself: its learning rate, in units of the part's, and whether it decays;
    None = all weights are alike.
    """

    module: torch.nn.Module
    ema: bool = True
    lr_scale: float = 1.0
    betas: tuple[float, float] | None = None
    groups: Callable[[str, Tensor], tuple[float, bool]] | None = None


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A network that only answers: eval mode, no gradients, not saved in checkpoints."""

    module: torch.nn.Module


@dataclass(frozen=True, kw_only=True)
class Average:
    """A network without gradients that a method moves by yielding `Follow`; saved in checkpoints.

    of: the part whose weights it begins with, so that a run that starts from given weights gives them to both.
    """

    module: torch.nn.Module
    of: str | None = None


@runtime_checkable
class Settles(Protocol):
    """A module within a network that learns something without a gradient, such as moving averages of what it saw.

    Its forward passes in training mode note what there is to learn, however many there are in a step.
    """

    def settle(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Called once for every optimiser step of its network: learn what was noted, and forget it.

        summed: of a tensor over all processes; they have to ask for the same ones.
        """
        ...


class Parts:
    """The networks of a method by role: `Parts(student=Trained(...), teacher=Frozen(...))`, then `parts.student`."""

    def __init__(self, **roles: Trained | Frozen | Average) -> None:
        self.roles = roles

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["roles"][name].module
        except KeyError:
            raise AttributeError(f"no part {name!r}; there are {sorted(self.__dict__.get('roles', {}))}") from None


class Method(Protocol):
    """A way to train: which networks there are, and what one training step does.

    `product` names the part that is the result of training (its average is what gets exported). A method whose product
    is of images and never of latents of them, such as an autoencoder, says so by `of_images = True`.
    """

    product: ClassVar[str]

    def step(self, parts: Any, batch: Any, noise: Any, clock: Clock) -> Iterator[Event]:
        """One training step on one micro-batch; each yielded `Update` is one optimiser step.

        The annotation of `batch` says which kind of example the method learns from.

        With gradient accumulation the trainer advances the generators of all micro-batches in lockstep, so each has to
        yield the same sequence of events.
        """
        ...
