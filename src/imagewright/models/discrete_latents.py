"""A denoiser that is told discrete latents of the image, the encoder that finds them, and the prior that draws them.

Source   Xu et al. 2024 (DisCo-Diff, arXiv 2407.03300). `networks.latent_layers` says how a U-Net is told.
Stages   The encoder and the denoiser are trained together, the prior afterwards (`methods.disco_diff`); a model of the
         first stage alone has none, and draws with "no latents".
Drawing  The prior, a causal transformer that knows the class, draws an image's latents by noise of their own
         (`samplers.latents_first`); any sampler then goes its way with the latents fixed.
Likelihood   -ln p(x) <= -ln p(x | z) - ln p(z) for any z; the encoder's likeliest is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.causal import CausalTokenModel
from imagewright.models.preconditioning import Describable, EDMPrecond, NoiseLabel
from imagewright.models.recast import Ask
from imagewright.networks import UNet
from imagewright.networks.latent_encoder import LatentEncoder
from imagewright.networks.latent_layers import LatentLayers
from imagewright.types import Condition, Noise, UserError


class LatentDenoiser(EDMPrecond):
    """D(x, sigma, z), z the vectors in `Condition.latents`; None = no latents.

    encoder: a `LatentEncoder`. groups, width, depth, heads: of `LatentLayers`. prior: a causal network over tokens, or
    None. Raises UserError for networks of other kinds or that do not fit together.
    """

    settings = (*EDMPrecond.settings, "groups", "width", "depth", "heads")
    begins_afresh: ClassVar[tuple[str, ...]] = ("encoder.", "latents.")
    """What the weights that a run starts from may lack: those of a plain denoiser do."""
    for_training: ClassVar[tuple[str, ...]] = ("prior.",)

    def __init__(
        self,
        network: nn.Module,
        encoder: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        groups: int = 1,
        width: int = 192,
        depth: int = 6,
        heads: int = 4,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        if not isinstance(network, UNet):
            raise UserError(f"the network is {an(type(network).__name__)}; latents are told to U-Nets alone")
        if not isinstance(encoder, LatentEncoder):
            raise UserError(f"the encoder is {an(type(encoder).__name__)}; it must be a LatentEncoder")
        self.groups, self.width, self.depth, self.heads = groups, width, depth, heads
        length, values = encoder.config.length, encoder.config.values
        self.encoder = encoder
        self.latents = LatentLayers(network, length, values, groups, width, depth, heads)
        self.prior = prior
        if prior is not None:
            self.token_model()  # which holds the one against the other

    def train(self, mode: bool = True) -> Self:
        """With a prior it is the prior that learns: the rest stays as it answers."""
        super().train(mode and self.prior is None)
        if self.prior is not None:
            self.prior.train(mode)
        self.training = mode
        return self

    def token_model(self) -> CausalTokenModel:
        """The prior as a model of tokens. Raises UserError where there is none yet, or none that fits."""
        if self.prior is None:
            raise UserError("this model has no prior yet, which draws its latents: train it with LatentPrior")
        return CausalTokenModel(self.prior, LatentCodec(self.encoder))

    def through(self, network: Ask, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        if network is self.network:
            network = self.ask
        elif isinstance(network, UNet):
            network = self.informed(network, cond)
        return super().through(network, x, sigma, cond)

    def ask(self, x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        """The network's answer, told the latents of a condition; what `samplers.replay` replays."""
        answer: Tensor = self.informed(self.network, cond)(x, noise_label, cond)
        return answer

    def informed(self, network: Any, cond: Condition) -> Any:
        """The U-Net, told the latents of a condition."""
        return self.latents.of(network, self.latents(None) if cond.latents is None else cond.latents)

    def with_latents(self, cond: Condition, tokens: Tensor) -> Condition:
        """The condition with latents int64 [N, m] in it."""
        return replace(cond, latents=self.latents(tokens))

    @torch.no_grad()
    def recognised(self, images: Tensor, cond: Condition) -> tuple[Condition, Tensor]:
        """The condition of images [N, C, H, W] that are there, and -ln p of its latents in nats, float64 [N].

        The encoder's likeliest latents; without a prior none, which is certain.
        """
        if self.prior is None:
            return cond, torch.zeros(len(images), dtype=torch.float64, device=images.device)
        model = self.token_model()
        tokens = model.codec.encode(images)
        return self.with_latents(cond, tokens), model.nll(tokens, cond)

    def describe(self) -> dict[str, Any]:
        described = {**super().describe(), "encoder": self.encoder.describe()}
        return described if self.prior is None else {**described, "prior": cast(Describable, self.prior).describe()}


def told_latents(model: object) -> LatentDenoiser | None:
    """The model within that is told latents; None where there is none.

    Raises UserError for several, as of a model and its guide: the latents of the one mean nothing to the other.
    """
    within = model.modules() if isinstance(model, nn.Module) else ()
    found = [each for each in within if isinstance(each, LatentDenoiser)]
    if len(found) > 1:
        raise UserError(
            "model and guide are told discrete latents of their own; those of one mean nothing to the other"
        )
    return found[0] if found else None


class LatentCodec(nn.Module):
    """An encoder's latents as tokens, one way: no image is made of them alone."""

    lossless = False

    def __init__(self, encoder: LatentEncoder) -> None:
        super().__init__()
        self._encoder = (encoder,)  # no child: its weights are another's
        self.length, self.values = encoder.config.length, encoder.config.values

    def encode(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """[N, C, H, W] -> int64 [N, m]: the likeliest, or with noise a draw of each latent's distribution."""
        logits: Tensor = self._encoder[0](images)
        return (logits if noise is None else logits + gumbel(logits, noise)).argmax(2)

    def decode(self, tokens: Tensor) -> Tensor:
        """Not possible."""
        raise UserError("discrete latents alone are no image; the denoiser draws it")


def gumbel(like: Tensor, noise: Noise) -> Tensor:
    """Standard Gumbel noise of `like`'s shape: argmax(logits + gumbel) is a draw of softmax(logits)."""
    uniform = noise.uniform(torch.empty(like.shape, dtype=torch.promote_types(like.dtype, torch.float32),
                                        device=like.device))  # fmt: skip
    least = torch.finfo(uniform.dtype).tiny
    return -torch.log(-torch.log(uniform.clamp(min=least)))
