"""Pictures and texts in one space, as a model on disk: an encoder that names classes by what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.data.caption_tables import Prompts, check_prompts
from imagewright.data.words import encoded, vocabulary
from imagewright.errors import an
from imagewright.models.view import seen
from imagewright.networks import CLIP
from imagewright.precision import uncast
from imagewright.shapes import misfit
from imagewright.types import Encoding, ModelKind, Resize, UserError, View


class ImageText(nn.Module):
    """A `CLIP` as a `types.Encoder`: embeddings of pictures, tokens, and where it has prompts logits of their classes.

    words: of which `data.words.vocabulary` makes its vocabulary; "" = it came without one. prompts: for each language
    its name, sentences with {} where a class is named, and the classes' names; the first one is spoken unless another
    is asked for (`speak`). mean, std, resize: the rest of its view. Raises UserError for other networks and settings.
    """

    kind: ClassVar[ModelKind] = "encoder"

    def __init__(
        self,
        network: nn.Module,
        words: Any = "",
        prompts: Sequence[Any] = (),
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        resize: Resize = "bicubic",
    ) -> None:
        super().__init__()
        if not isinstance(network, CLIP):
            raise UserError(f"an encoder of pictures and texts needs a CLIP, not {an(type(network).__name__)}")
        config = network.config
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, config.in_channels) or not all(0 < v <= 1 for v in values):
                raise UserError(f"{name} is {tuple(values)}; it must be one number in (0, 1], or one for each channel")
        if resize not in get_args(Resize):
            raise UserError(f"resize is {resize!r}; allowed: {', '.join(get_args(Resize))}")
        self.network, self.words = network, words
        self.prompts: Prompts = _checked(prompts)
        self.language = next(iter(self.prompts), None)
        self._classes: dict[str, Tensor] = {}
        self.view = View(
            side=config.img_resolution,
            channels=config.in_channels,
            resize=resize,
            mean=tuple(float(m) for m in mean),
            std=tuple(float(s) for s in std),
        )

    def speak(self, language: str) -> None:
        """From here on logits are by this language's prompts. Raises UserError for one without."""
        if language not in self.prompts:
            raise UserError(f"no prompts are in {language!r}; there are {', '.join(self.prompts) or 'none'}")
        self.language = language

    def train(self, mode: bool = True) -> ImageText:
        """As of every module; what the prompts were is forgotten."""
        self._classes = {}
        return super().train(mode)

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> embeddings (not normalised), patches, logits where there are prompts; float32."""
        with uncast(images.device):
            made: Encoding = self.network.image(seen(images.float(), self.view))
            if self.language is None:
                return made
            return made._replace(logits=self.logits(made.pooled, self.classes(self.language)))

    def logits(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines of embeddings [N, D] and [K, D], [N, K]."""
        return self.network.log_scale.exp() * F.normalize(pictures, dim=1) @ F.normalize(texts, dim=1).mT

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, [N, D], not normalised. Raises UserError for a model without a vocabulary."""
        if not self.words:
            raise UserError("this model came without the tokenizer of its texts")
        tokens = encoded(vocabulary(self.words), texts, self.network.config.length)
        made: Tensor = self.network.text(tokens.to(self.network.log_scale.device))
        return made

    def classes(self, language: str) -> Tensor:
        """What stands for each class in a language, [K, D]: the mean of its sentences' directions, of unit length."""
        kept = self._classes.get(language)
        if kept is None or kept.device != self.network.log_scale.device:
            told = self.prompts[language]
            with torch.no_grad():
                kept = torch.stack([self._direction(told["templates"], name) for name in told["classes"]])
            if not self.training:
                self._classes[language] = kept
        return kept

    def _direction(self, templates: Sequence[str], name: str) -> Tensor:
        each = F.normalize(self.texts([template.replace("{}", name) for template in templates]), dim=1)
        return F.normalize(each.mean(0), dim=0)

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        view = {"mean": list(self.view.mean), "std": list(self.view.std), "resize": self.view.resize}
        told = {"words": self.words, "prompts": listed(self.prompts)}
        return {"class": type(self).__name__, **view, **told, "network": self.network.describe()}


def listed(prompts: Prompts) -> list[Any]:
    """Prompts as an `ImageText` takes them."""
    return [[language, list(told["templates"]), list(told["classes"])] for language, told in prompts.items()]


def _checked(told: Sequence[Any]) -> Prompts:
    """The inverse of `listed`."""
    if (fault := misfit(list(told), list[tuple[str, list[str], list[str]]], "prompts")) is not None:
        raise UserError(fault)
    prompts: Prompts = {language: {"templates": some, "classes": names} for language, some, names in told}
    check_prompts(prompts, "prompts")
    return prompts
