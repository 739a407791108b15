"""The VQ tokenizer of MaskGIT (Chang et al. 2022, arXiv 2202.04200, stage 1): a VQGAN without attention.

Networks   tokenizer (trained, the product), discriminator (trained, one step for each of the tokenizer's; none where
           the adversarial weight is 0), features (frozen, of the perceptual distance; none where its weight is 0).
Loss       |x - x_hat|^2 + 0.1 perceptual(x, x_hat) + |e - sg(z)|^2 + 0.25 |sg(e) - z|^2 + 0.1 L_entropy
           + 0.1 softplus(-D(x_hat));  z the encoder's output, e its nearest code; squares are means over the numbers,
           |x - x_hat|^2 in units of the colour range, for which the published weights are ([0, 1]; ours is 2 wide).
Entropy    p(k | place) = softmax(-|z - e_k|^2 / 0.01);  L_entropy = mean H(p) - H(mean p), over the tokens of a micro-
           batch: every token is to be decided, all together are to use the whole codebook. Least, -ln K, where
           assignments are one-hot and uniform. 1e-5 is added within the second logarithm. It keeps codes alive.
Adversary  softplus(-D(x)) + softplus(D(x_hat)) + 10 |grad_x D(x)|^2 (R1, x in units of the colour range); x_hat is that
           of the tokenizer's own step. D(x) is the mean over the discriminator's places, as is its softplus.
Optimiser  the run's, published: Adam with betas (0, 0.99) for both.
Departs    Perceptual: channel-normalised feature maps of a network given as `features`, where the published one takes
           a classifier's (ResNet) outputs; without `features` its weight has to be 0. The networks see colours in
           [-1, 1], the published ones in [0, 1]. The training loop was never released: that both networks learn from
           one batch, the tokenizer first, is ours. `adversarial_start` is VQGAN's (2012.09841); here published: 0. The
           alternative quantiser (Gumbel softmax) is left out.
Checked    losses, penalty, counts and answers of both networks against the released program; straight-through gradient
           is the identity; the entropy loss against its least value; resume bit for bit, discriminator included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_non_negative, require_positive
from imagewright.methods.adversary import gradient_penalty
from imagewright.methods.distances import Distance, Features
from imagewright.models.vq import VQTokenizer, codebook_usage
from imagewright.networks.blur_discriminator import BlurDiscriminator, Judge
from imagewright.networks.vq import Quantised
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, DataSpec, Event, Frozen, Parts, Trained, Update, UserError

PERCEPTUAL = Distance(kind="perceptual")
RANGE = 2.0
"""Width of the colour range in which images come."""
TINY = 1e-5
"""Keeps the slope of p log p finite for codes whose share rounds to 0."""


@dataclass(frozen=True, kw_only=True)
class VQTokenizerTraining:
    """Images through a codebook and back, judged by squares, a classifier's features and a discriminator."""

    product: ClassVar[str] = "tokenizer"
    of_images: ClassVar[bool] = True

    pixels: float = 1.0
    """Weight of the mean squared difference of colours, in units of their range."""
    perceptual: float = 0.1
    """Weight of the distance between feature maps; needs `features`."""
    commitment: float = 0.25
    entropy: float = 0.1
    entropy_temperature: float = 0.01
    adversarial: float = 0.1
    """0 = without a discriminator."""
    adversarial_start: float = 0.0
    """Share of the run after which the discriminator comes in."""
    r1: float = 10.0
    judge: Judge = "patches"
    """What the discriminator judges: places of about 4 x 4, or (published) the whole image."""
    discriminator_width: int = 64

    def __post_init__(self) -> None:
        for name in ("pixels", "perceptual", "commitment", "entropy", "adversarial", "r1"):
            require_non_negative(f"method.{name}", getattr(self, name))
        require_positive("method.entropy_temperature", self.entropy_temperature)
        if not 0 <= self.adversarial_start < 1:
            raise UserError(f"method.adversarial_start is {self.adversarial_start}; it must lie in [0, 1)")

    def parts(self, *, network: nn.Module, spec: DataSpec, features: Features | None = None) -> Parts:
        """network: a `networks.vq.VQAutoencoder`. Raises UserError for another, or where features are missing."""
        more: dict[str, Trained | Frozen] = {}
        if self.perceptual:
            if not isinstance(features, nn.Module):
                raise UserError(
                    f"method.perceptual is {self.perceptual}; it needs a feature network (`features`), or must be 0"
                )
            more["features"] = Frozen(module=features)
        if self.adversarial:
            judge = BlurDiscriminator(spec.resolution, spec.channels, self.discriminator_width, self.judge)
            more["discriminator"] = Trained(module=judge, ema=False)
        return Parts(tokenizer=Trained(module=VQTokenizer(network)), **more)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the tokenizer, then one of the discriminator."""
        fights = self.adversarial > 0 and clock.fraction >= self.adversarial_start
        rebuilt, quantised = parts.tokenizer(batch.images)
        yield self._learn(parts, batch.images, rebuilt, quantised, fights)
        if fights:
            yield self._discriminate(parts.discriminator, batch.images, rebuilt.detach())

    def _learn(self, parts: Any, images: Tensor, rebuilt: Tensor, quantised: Quantised, fights: bool) -> Update:
        tokenizer = parts.tokenizer
        pixels = ((rebuilt - images) / RANGE).square().flatten(1).mean(1)
        codebook = (quantised.codes - quantised.z.detach()).square().flatten(1).mean(1)
        commitment = (quantised.codes.detach() - quantised.z).square().flatten(1).mean(1)
        entropy = entropy_loss(quantised.distances, self.entropy_temperature)
        loss = self.pixels * pixels + codebook + self.commitment * commitment + self.entropy * entropy
        usage = codebook_usage(quantised.tokens, tokenizer.values)
        numbers = {"pixels": pixels, "commitment": commitment, "entropy": entropy}
        numbers |= {"perplexity": loss.new_tensor(usage.perplexity), "unused_codes": loss.new_tensor(usage.dead)}
        if self.perceptual:
            numbers["perceptual"] = PERCEPTUAL(rebuilt, images, parts.features)
            loss = loss + self.perceptual * numbers["perceptual"]
        if fights:
            numbers["adversarial"] = F.softplus(-parts.discriminator(rebuilt)).mean(1)
            loss = loss + self.adversarial * numbers["adversarial"]
        return Update("tokenizer", loss, parts=numbers)

    def _discriminate(self, discriminator: nn.Module, images: Tensor, rebuilt: Tensor) -> Update:
        real = images.detach().requires_grad_(True)
        logits = discriminator(real)
        kept, refused = F.softplus(-logits).mean(1), F.softplus(discriminator(rebuilt)).mean(1)
        loss = kept + refused
        numbers = {"real": kept, "fake": refused}
        if self.r1:
            numbers["r1"] = RANGE**2 * gradient_penalty(logits, real)  # per colour range
            loss = loss + self.r1 * numbers["r1"]
        return Update("discriminator", loss, parts=numbers)


def entropy_loss(distances: Tensor, temperature: float) -> Tensor:
    """Mean entropy of the tokens' soft assignments, less the entropy of their mean over all images: [N].

    distances: [N, L, K]. The mean over images is at least -ln K.
    """
    log_shares = F.log_softmax(-distances.float() / temperature, dim=2)
    shares = log_shares.exp()
    each = -(shares * log_shares).sum(2).mean(1)
    mean = shares.mean((0, 1))
    return each + (mean * (mean + TINY).log()).sum()
