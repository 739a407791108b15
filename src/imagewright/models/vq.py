"""The VQ tokenizer as a model on disk: a `types.Codec` that draws nothing, and whose tokens other models learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.tokens import check_tokens
from imagewright.networks.vq import Quantised, VQAutoencoder
from imagewright.types import ModelKind, UserError


class VQTokenizer(nn.Module):
    """Images as indices into a learned codebook, one for each square of pixels, and back.

    network: a `VQAutoencoder`. Raises UserError for another.
    """

    kind: ClassVar[ModelKind] = "codec"
    lossless = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, VQAutoencoder):
            raise UserError(f"a VQ tokenizer needs a VQAutoencoder as its network, not {an(type(network).__name__)}")
        self.network = network
        self.values, self.length = network.config.codebook_size, network.config.side**2

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """Reconstructions [N, C, H, W], with gradient, and what the quantiser did."""
        reconstructed: tuple[Tensor, Quantised] = self.network(images)
        return reconstructed

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> int64 [N, length]. Raises UserError for images of another size."""
        with torch.autocast(images.device.type, enabled=False):  # a token shall not depend on a run's precision
            return self.network.encode(images.float()).tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor, expansion: int = 1) -> Tensor:
        """Tokens -> [N, C, H, W] in [-1, 1], float32. Raises UserError for a token that is not in the codebook.

        expansion: how many times as many rows and columns there are, of a picture that much larger.
        """
        check_tokens(tokens, self, expansion=expansion)
        codes = self.network.quantiser.lookup(tokens, self.network.config.side * expansion)
        return self.network.decode(codes).float().clamp(-1, 1)

    @torch.no_grad()
    def codes(self, tokens: Tensor) -> Tensor:
        """The codes [N, D, h, w] that tokens stand for."""
        return self.network.quantiser.lookup(tokens, self.network.config.side)

    def places(self, pixels: Tensor) -> Tensor:
        """Which tokens [length] an edit of some pixels (bool [H, W]) has to draw anew: theirs and the next ones.

        A code's pixels depend on its neighbours, so the edited region grows by a token on every side.
        """
        return touched_places(pixels, self.network.config.factor).flatten()

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        return {"class": type(self).__name__, "network": self.network.describe()}


def touched_places(pixels: Tensor, factor: int) -> Tensor:
    """Places of a grid, each of factor x factor pixels, that an edit of pixels (bool [H, W]) changes: bool [h, w].

    They and the next ones, on whose neighbours their pixels depend.
    """
    touched = nn.functional.max_pool2d(pixels[None, None].float(), factor)
    return nn.functional.max_pool2d(touched, 3, stride=1, padding=1)[0, 0] > 0


@dataclass(frozen=True)
class CodebookUsage:
    """How evenly tokens use a codebook.

    perplexity: exp of the entropy of the codes' frequencies; the codebook's size where all are used alike.
    dead: how many codes are never used.
    """

    perplexity: float
    dead: int


def codebook_usage(tokens: Tensor, values: int) -> CodebookUsage:
    """Of tokens of any shape, 0 .. values - 1."""
    counts = torch.bincount(tokens.flatten(), minlength=values).double()
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return CodebookUsage(float(entropy.exp()), int((counts == 0).sum()))
