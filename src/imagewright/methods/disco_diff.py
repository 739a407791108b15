"""Diffusion with learned discrete latents, DisCo-Diff (Xu et al. 2024, arXiv 2407.03300). Two stages.

Source     the paper; its image program is not public. github.com/gcorso/disco-diffdock, the same authors' program for
           molecular docking: `models/latent_encoder.py`, `models/layers.py` (gumbel_softmax), `autoregressive/`.
Stage 1    (`DiscoDiff`) denoiser (trained: `models.discrete_latents`): U-Net, cross-attentions, their transformer and
           encoder, one optimiser, one average. The encoder sees the clean image; its latents pass through a
           Gumbel-softmax at temperature 1 as shares of all values (`hard`: one value, the gradient straight through, as
           in the docking program); with probability 0.1 an image's latents are hidden, all at once. Loss: EDM's, and
           nothing beside it. It begins as a denoiser, `--start RUN`, or from nothing.
Stage 2    (`LatentPrior`) prior (trained: any of the causal networks), the rest frozen: -ln p(z | class), the mean over
           the latents, of latents drawn from the encoder's distribution (argmax of logits + Gumbel noise: the softmax
           at a temperature near 0). The product is the whole model.
Sampling   `samplers.latents_first`, then any sampler. Guidance on latents: D(z) + s (D(z) - D(none)), `guidance` with
           w = 1 + s; the paper's best is s = 1.
Departs    Of the docking program: none of its networks; its prior's loss is against the soft distribution
           (`no_sampling`), of one latent at a time. Averages include the encoder, which has none there. Its "no
           latents" is zeros and a vector on every node, ours a vector in every latent's place.
           `networks.latent_encoder` and `networks.latent_layers` say what the paper leaves open. Not built in: PFGM++,
           ImageNet-128's U-ViT with its own noise levels, and the base model's turn at low noise there.
Collapse   With small batches and high rates, as in the digits' recipe, the encoder soon gave all images one value, from
           which nothing brought it back; `batch_norm` (the docking program's) does not let it.
Checked    Gumbel-max frequencies; temperature to 0; teacher-exact start for every latent; one value, or latents always
           hidden, give EDM's loss and samples; exact denoisers of single components have straight paths; groups hear of
           theirs alone; gradients; resume bit for bit of both stages.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.methods.autoregressive import numbers
from imagewright.methods.edm import EDM
from imagewright.methods.maskgit import hide_labels
from imagewright.models.discrete_latents import LatentDenoiser, gumbel
from imagewright.models.tokens import negative_log
from imagewright.networks.latent_encoder import LatentEncoder, LatentEncoderConfig
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, DataSpec, Denoiser, Event, Noise, Parts, Trained, Update, UserError


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes of a transformer."""

    width: int = 192
    depth: int = 6
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class DiscoDiff:
    """Stage 1: a denoiser and the encoder whose discrete latents it is told."""

    product: ClassVar[str] = "denoiser"

    base: EDM = EDM()
    """Noise levels, weight, range and augmentation; of its preconditionings "edm" alone."""
    latents: int = 10
    """m: discrete latents of an image."""
    values: int = 100
    """k: values of each."""
    groups: int = 1
    """1: every attention hears of all latents; else as many as resolutions with attention on the way up, each of which
    hears of its own group (group-hierarchical; the paper's has 3 groups of 10)."""
    temperature: float = 1.0
    """Of the Gumbel-softmax."""
    hard: bool = False
    """One value at a time, the gradient straight through, in place of shares of all."""
    latent_dropout: float = 0.1
    """Share of images whose latents are hidden; at 0 there is no guidance, and nothing to draw before the prior is."""
    patch: int = 8
    """Side of the encoder's patches, in pixels."""
    encoder: Transformer = Transformer(width=768, depth=12, heads=12)
    """What finds the latents in an image."""
    batch_norm: bool = False
    """Normalise over the batch what the encoder's logits are made of, as the docking program's predictor does: small
    batches and high rates else end with one value for all images, which is the fastest way to be rid of the noise."""
    told: Transformer = Transformer()
    """What goes over the latents' vectors before the network hears of them."""

    def __post_init__(self) -> None:
        if self.base.preconditioning != "edm" or self.base.uncertainty:
            raise UserError(
                "method.base has another preconditioning than 'edm', or its uncertainty; latents go with edm"
            )
        require_positive("method.temperature", self.temperature)
        for name in ("latents", "values", "groups", "patch"):
            if getattr(self, name) < 1:
                raise UserError(f"method.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.latent_dropout <= 1:
            raise UserError(f"method.latent_dropout is {self.latent_dropout}; it must lie in [0, 1]")

    @property
    def augment_dim(self) -> int:
        """Length of the augmentation vector that the network has to take."""
        return self.base.augment_dim

    def parts(self, *, network: nn.Module, spec: DataSpec) -> Parts:
        """network: one of the U-Nets, untrained, or with a denoiser's weights by `start`."""
        encoder = LatentEncoder(
            LatentEncoderConfig(
                img_resolution=spec.resolution, in_channels=spec.channels, length=self.latents, values=self.values,
                patch=self.patch, width=self.encoder.width, depth=self.encoder.depth, heads=self.encoder.heads,
                batch_norm=self.batch_norm,
            )
        )  # fmt: skip
        base, told = self.base, self.told
        sizes = (*base.sigma_range, base.sigma_data, base.noise_label)
        denoiser = LatentDenoiser(network, encoder, *sizes, self.groups, told.width, told.depth, told.heads)
        return Parts(denoiser=Trained(module=denoiser))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of denoiser and encoder."""
        model, base, images, cond = parts.denoiser, self.base, batch.images, batch.cond
        if base.augment.p > 0:
            images, parameters = base.augment(images, noise)
            cond = replace(cond, augment=parameters)
        # In the order in which EDM draws; what it does not draw comes last.
        sigma = base.training_levels.sample(noise, images[:, 0, 0, 0])
        noisy = images + sigma[:, None, None, None] * noise.normal(images)
        logits = model.encoder(images)
        vectors = model.latents(self.relaxed(logits, noise), noise.uniform(sigma) < self.latent_dropout)
        answer = model(noisy, sigma, replace(cond, latents=vectors))
        error = (answer - images).square().flatten(1).mean(1)
        yield Update("denoiser", base.weight(sigma) * error, parts={"perplexity": perplexity(logits)}, at=sigma)

    def relaxed(self, logits: Tensor, noise: Noise) -> Tensor:
        """Shares of all values [N, m, k] that the denoiser is told."""
        return gumbel_softmax(logits, noise, self.temperature, hard=self.hard)


@dataclass(frozen=True, kw_only=True)
class LatentPrior:
    """Stage 2: what draws the latents of a model of the first stage."""

    product: ClassVar[str] = "model"
    tells_latents: ClassVar[bool] = True
    """Whether it knows what to do with a model that is told latents; other methods are given none."""

    def parts(self, *, network: nn.Module, teacher: Denoiser, spec: DataSpec) -> Parts:
        """network: causal, (tokens, time, cond) -> logits, of the latents' number and values. teacher: of stage 1.

        Raises UserError for another teacher, and for a network that does not fit.
        """
        if not isinstance(teacher, LatentDenoiser):
            raise UserError(f"the teacher is {an(type(teacher).__name__)}; a prior is of a model with discrete latents")
        model = copy.deepcopy(teacher).requires_grad_(False)
        model.prior = network.requires_grad_(True)
        model.token_model()
        return Parts(model=Trained(module=model))

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the prior."""
        model = parts.model
        prior = model.token_model()
        with torch.no_grad():
            tokens = prior.codec.encode(batch.images, noise)
        cond = hide_labels(batch.cond, getattr(model.network.config, "label_dropout", 0.0), noise)
        logits = prior.logits(tokens, cond)
        per_image = negative_log(logits, tokens).mean(1)
        yield Update("model", per_image, parts=numbers(per_image, logits, tokens))


def gumbel_softmax(logits: Tensor, noise: Noise, temperature: float = 1.0, *, hard: bool = False) -> Tensor:
    """softmax((logits + Gumbel noise) / temperature) over the last axis; hard: one-hot, with that one's gradient."""
    soft = ((logits + gumbel(logits, noise)) / temperature).softmax(-1)
    if not hard:
        return soft
    chosen = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return chosen + soft - soft.detach()


def perplexity(logits: Tensor) -> Tensor:
    """How many values are in use, [], 1 to k: exp of the entropy of their mean share, the mean over latents.

    Few mean that the encoder says the same of all images; many also come of one that has not made up its mind.
    """
    shares = logits.detach().softmax(-1).mean(0)
    return (-(shares * shares.clamp(min=1e-12).log()).sum(-1)).exp().mean()
