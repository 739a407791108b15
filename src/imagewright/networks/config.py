"""What architectures have in common: a configuration that is their only argument, its validity, JSON.

The U-Nets' argument names are those of the reference implementation of Karras et al. 2022 (arXiv 2206.00364), so that
the arguments of a released checkpoint can be passed as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from imagewright.types import UserError


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of a sentence on an unknown name: "; did you mean 'x'?", or all names when none is near."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known are {', '.join(options)}"


def require(condition: bool, what: str, value: object, allowed: str) -> None:
    """Raise UserError "<what> is <value>; it must be <allowed>" unless the condition holds."""
    if not condition:
        raise UserError(f"{what} is {value!r}; it must be {allowed}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Base of every architecture's configuration. Sequences may be given as lists (JSON)."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises UserError on an unknown or missing argument."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"{cls.__name__} has no argument {name!r}{did_you_mean(name, known)}")
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise UserError(f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**values)

    def require_whole(self, name: str, least: int) -> None:
        """Raise UserError unless an argument is a whole number, no less than that."""
        require(_is_int(getattr(self, name), least), name, getattr(self, name), f"an integer >= {least}")

    def to_json(self) -> dict[str, Any]:
        """All arguments as plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


class Network(nn.Module):
    """An architecture whose only argument is its configuration."""

    config_class: ClassVar[type[NetworkConfig]]
    config: Any
    """Of `config_class`."""
    quantized: NetworkConfig | None = None
    """How many bits its weights have, of a `networks.quantized` one."""

    def describe(self) -> dict[str, Any]:
        """JSON from which `models.description.build` makes the same architecture again."""
        bits = {} if self.quantized is None else {"quantized": self.quantized.to_json()}
        return {"class": type(self).__name__, "config": self.config.to_json(), **bits}


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """Fields shared by `SongUNetConfig` and `DhariwalUNetConfig`; sequences may be given as lists (JSON).

    Raises UserError on a value outside its range.
    """

    img_resolution: int
    """Height and width of the images, a multiple of 2 ** (levels - 1)."""
    in_channels: int
    out_channels: int
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    augment_dim: int = 0
    """Length of the augmentation vector; 0 = it is ignored."""
    model_channels: int = 128
    """Base number of channels, multiplied per level by `channel_mult`."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """One multiplier per level, from full resolution downwards; each level halves the resolution."""
    channel_mult_emb: int = 4
    """Width of the embedding vector in units of `model_channels`."""
    num_blocks: int = 4
    """Residual blocks per level in the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions at which blocks have self-attention (the lowest level has it once in any case)."""
    dropout: float = 0.10
    """Probability of zeroing a hidden activation in training."""
    label_dropout: float = 0.0
    """Probability of hiding an image's class in training, for classifier-free guidance."""
    destination: bool = False
    """Also told the noise level to go to (`Condition.destination`), as the network of a trajectory model is."""
    weight: bool = False
    """Also told the strength of guidance (`Condition.weight`), as guided students are."""
    double_norm: bool = False
    """The embedding scales and shifts after each second norm by vectors that are normalised themselves (sCM)."""

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            value = getattr(self, name)
            require(isinstance(value, list | tuple), name, value, "a list of positive integers")
            require(all(_is_int(v, 1) for v in value), name, value, "a list of positive integers")
            object.__setattr__(self, name, tuple(value))
        for name in ("img_resolution", "in_channels", "out_channels", "channel_mult_emb", "num_blocks"):
            require(_is_int(getattr(self, name), 1), name, getattr(self, name), "a positive integer")
        for name in ("label_dim", "augment_dim"):
            require(_is_int(getattr(self, name), 0), name, getattr(self, name), "an integer >= 0")
        require(
            _is_int(self.model_channels, 4) and self.model_channels % 2 == 0,
            "model_channels",
            self.model_channels,
            "an even integer >= 4 (half of the noise embedding are sines)",
        )
        require(
            len(self.channel_mult) > 0,
            "channel_mult",
            self.channel_mult,
            "one multiplier per level, at least one",
        )
        step = 2 ** (len(self.channel_mult) - 1)
        require(
            self.img_resolution % step == 0,
            "img_resolution",
            self.img_resolution,
            f"divisible by {step} for the {len(self.channel_mult)} levels of channel_mult",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(0 <= self.label_dropout <= 1, "label_dropout", self.label_dropout, "in [0, 1]")
