"""Tokens as bits, bits as real numbers, and a denoiser of those (analog bits; Chen et al. 2022, arXiv 2208.04202).

Bits       each token's code in binary, least significant bit first; a bit is -b or b. What is denoised is a picture of
           them, [bits of all planes, H, W]: of 8-bit colours 24 channels, those of a colour together; of a tokenizer's
           codes as many as its values need, over its own square of places.
Codes      binary, the value itself; gray, reflected Gray code, in which neighbours differ in one bit; random, a fixed
           shuffling of the values (that of the released program, for 256). Control: one-hot, a channel for each value.
Network    is told 1000 gamma and given x_t = sqrt(gamma) x; its answer is the bits themselves.
Heads      mse, the answer is x0; sigmoid, x0 = (2 sigmoid(answer) - 1) b, bit by bit; softmax, over all codes of a
           token, x0 the mean of their bits.
Departs    A code that is no value (of codebooks whose size is no power of two) is read as the largest; the paper is
           silent. In the released program the softmax's cross-entropy is over a token's bits, not its codes, unless
           they are one-hot; the paper has it over the 256 values.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.models.preconditioning import Describable
from imagewright.models.tokens import negative_log
from imagewright.paths.gammas import sigma_range
from imagewright.precision import wide
from imagewright.types import UNCONDITIONAL, Codec, Condition, ModelKind, UserError

Encoding = Literal["binary", "gray", "random", "one-hot"]
Head = Literal["mse", "sigmoid", "softmax"]
SHUFFLE = 42
"""Seed of numpy's legacy generator, whose numbers never change, for the random encoding."""
MOST, MOST_ONE_HOT = 2**16, 2**10
"""Values that a table of codes is made for."""
TIME_SCALE = 1000.0
"""By which the network is told gamma."""


class AnalogBits(nn.Module):
    """A codec's tokens as pictures of bits, and back. No weights.

    latent: [K, H, W] of one image's bits. scale: b, what a bit is. patterns: bits of every code, 0 or 1, [codes, k].
    Raises UserError for an encoding or scale out of range, and for tokens that fill no square.
    """

    patterns: Tensor
    _code: Tensor
    _value: Tensor

    def __init__(self, codec: Codec, encoding: Encoding = "binary", scale: float = 1.0) -> None:
        super().__init__()
        if encoding not in get_args(Encoding):
            raise UserError(f"encoding is {encoding!r}; allowed: {', '.join(get_args(Encoding))}")
        require_positive("scale", scale)
        most = MOST_ONE_HOT if encoding == "one-hot" else MOST
        if codec.values > most:
            raise UserError(f"this codec has {codec.values} values; encoding {encoding!r} takes at most {most}")
        self.encoding, self.scale, self.values = encoding, scale, codec.values
        self.planes = getattr(codec, "channels", 1)
        side = math.isqrt(codec.length // self.planes)
        if self.planes * side**2 != codec.length:
            raise UserError(f"bits need tokens on a square; this codec has {codec.length} of {self.planes} planes")
        code, value = codes(encoding, codec.values)
        patterns = np.eye(codec.values) if encoding == "one-hot" else binary(len(value))
        self.latent = (self.planes * patterns.shape[1], side, side)
        for name, table in (("_code", code), ("_value", value), ("patterns", patterns.astype(np.float32))):
            self.register_buffer(name, torch.as_tensor(table), persistent=False)

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Codes of tokens [N, length], int64 [N, planes, H, W]."""
        side = self.latent[1]
        return self._code[tokens].view(-1, side, side, self.planes).permute(0, 3, 1, 2)

    def encode(self, tokens: Tensor) -> Tensor:
        """Bits of tokens int64 [N, length]: -scale or scale, float32 [N, *latent]."""
        bits = self.patterns[self.codes_of(tokens)]  # [N, planes, H, W, k]
        return (bits.permute(0, 1, 4, 2, 3).flatten(1, 2) * 2 - 1) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Tokens int64 [N, length] of real numbers [N, *latent]: each bit by its sign, of one-hot codes the largest."""
        bits = self.by_code(x).transpose(1, 2).transpose(2, 3)  # [N, H, W, planes, k]
        if self.encoding == "one-hot":
            code = bits.argmax(4)
        else:
            code = ((bits > 0) * 2 ** torch.arange(bits.shape[4], device=x.device)).sum(4)
        return self._value[code].flatten(1)

    def mean(self, logits: Tensor) -> Tensor:
        """The mean bits, in [-scale, scale], under logits of all codes [N, planes * codes, H, W]."""
        share = torch.softmax(self.by_code(logits), 4) @ self.patterns.to(logits.dtype)
        return (share.permute(0, 1, 4, 2, 3).flatten(1, 2) * 2 - 1) * self.scale

    def by_code(self, logits: Tensor) -> Tensor:
        """[N, planes * codes, H, W] as [N, planes, H, W, codes]."""
        return logits.view(len(logits), self.planes, -1, *logits.shape[2:]).permute(0, 1, 3, 4, 2)


def codes(encoding: Encoding, values: int) -> tuple[np.ndarray, np.ndarray]:
    """The code of every value, [values], and the value of every code, [codes], int64."""
    count = values if encoding == "one-hot" else 2 ** max((values - 1).bit_length(), 1)
    code = np.arange(values)
    if encoding == "gray":
        code = code ^ (code >> 1)
    if encoding == "random":
        np.random.RandomState(SHUFFLE).shuffle(code)
    value = np.full(count, values - 1)
    value[code] = np.arange(values)
    return code.astype(np.int64), value.astype(np.int64)


def binary(count: int) -> np.ndarray:
    """The bits of 0 .. count - 1, a power of two, least significant first: [count, bits]."""
    return (np.arange(count)[:, None] >> np.arange((count - 1).bit_length())) & 1


class BitDenoiser(nn.Module):
    """A denoiser of a codec's bits, and through the codec of images: `types.LatentDenoiser`.

    network: (x [N, *latent], 1000 gamma, cond) -> [N, C, H, W], C being `answers`; it may be `SelfConditioned`.
    schedule: of training, whose noise levels it knows. Raises UserError for settings out of range.
    """

    kind: ClassVar[ModelKind] = "latent_denoiser"
    space: ClassVar[str] = "bits"
    settings: ClassVar[tuple[str, ...]] = ("encoding", "scale", "head", "schedule")

    def __init__(
        self,
        network: nn.Module,
        codec: Codec,
        encoding: Encoding = "binary",
        scale: float = 1.0,
        head: Head = "mse",
        schedule: str = "cosine",
    ) -> None:
        super().__init__()
        if head not in get_args(Head):
            raise UserError(f"head is {head!r}; allowed: {', '.join(get_args(Head))}")
        self.network, self.codec, self.bits = network, codec, AnalogBits(codec, encoding, scale)
        self.encoding, self.scale, self.head, self.schedule = encoding, scale, head, schedule
        self.sigma_min, self.sigma_max = sigma_range(schedule)
        self.latent = self.bits.latent
        sizes: dict[str, int] = {"img_resolution": self.latent[1], "in_channels": self.latent[0],
                                 "out_channels": answers(self.bits, head)}  # fmt: skip
        config = getattr(network, "config", None)
        for name, wanted in sizes.items():
            if getattr(config, name, wanted) != wanted:
                raise UserError(f"{name} of the network is {getattr(config, name)}; bits of this codec need {wanted}")

    @property
    def bound(self) -> float:
        """The largest size of what is denoised."""
        return self.scale

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`, of bits x [N, *latent]."""
        return self.estimate(self.answer(x, sigma, cond)).to(x.dtype)

    def answer(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """What the network says, [N, C, H, W], float32 or wider; sigma: [N] or one number."""
        parameter = next(self.network.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        gamma = 1 / (1 + wide(sigma.expand(x.shape[0])) ** 2)
        scaled = gamma.sqrt().to(x.dtype)[:, None, None, None] * x
        answer: Tensor = self.network(scaled.to(dtype), (TIME_SCALE * gamma).to(dtype), cond)
        return answer.to(torch.promote_types(dtype, torch.float32))

    def estimate(self, answer: Tensor) -> Tensor:
        """Bits x0 [N, *latent] by the head."""
        if self.head == "softmax":
            return self.bits.mean(answer)
        return answer if self.head == "mse" else torch.tanh(answer / 2) * self.scale

    def loss(self, answer: Tensor, tokens: Tensor) -> Tensor:
        """The head's, [N]: the mean over bits; of the softmax, nats a token."""
        if self.head == "softmax":
            return negative_log(self.bits.by_code(answer), self.bits.codes_of(tokens)).flatten(1).mean(1)
        bits = self.bits.encode(tokens).to(answer.dtype)
        each = F.softplus(-answer * bits / self.scale) if self.head == "sigmoid" else (answer - bits).square()
        return each.flatten(1).mean(1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """It knows every level."""
        return torch.as_tensor(sigma)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """As `types.LatentDenoiser`."""
        return self.bits.encode(self.codec.encode(images))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `types.LatentDenoiser`: bits by their signs, then the codec."""
        return self.codec.decode(self.bits.decode(latents))

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        modules = {"network": self.network, "codec": self.codec}
        described = {name: cast(Describable, module).describe() for name, module in modules.items()}
        return {"class": type(self).__name__, **described, **{name: getattr(self, name) for name in self.settings}}


def answers(bits: AnalogBits, head: Head) -> int:
    """Channels that the network answers: a bit's, or of a softmax every code's."""
    return bits.planes * bits.patterns.shape[0] if head == "softmax" else bits.latent[0]
