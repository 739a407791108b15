"""VATT as a model on disk: a `types.Encoder` of pictures that also puts videos, sounds and captions into one space."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.data.clips import Clips
from imagewright.data.words import encoded, vocabulary
from imagewright.errors import an
from imagewright.files import parse_json
from imagewright.models.view import seen
from imagewright.networks.vatt import VATT, Joint
from imagewright.precision import uncast
from imagewright.types import Encoding, ModelKind, UserError, View


class VATTEncoder(nn.Module):
    """The towers of video, sound and words. A still picture is a video of as many frames as one token has.

    words: the vocabulary, as it describes itself (`data.words`), as JSON. Raises UserError for another network, and for
    a vocabulary that is not the network's size.
    """

    kind: ClassVar[ModelKind] = "encoder"

    def __init__(self, network: nn.Module, words: str) -> None:
        super().__init__()
        if not isinstance(network, VATT):
            raise UserError(f"this model needs a VATT as its network, not {an(type(network).__name__)}")
        self.network, self.words = network, vocabulary(parse_json(words, "the vocabulary"))
        if self.words.values != network.config.words:
            raise UserError(f"the network has {network.config.words} words, and its vocabulary {self.words.values}")
        self.view = View(side=network.config.img_resolution, channels=network.config.in_channels)

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> the pooled vector, and those of the patches. Raises UserError for other shapes."""
        with uncast(images.device):
            still = seen(images.float(), self.view)[:, :, None].expand(-1, -1, self.network.config.patch[0], -1, -1)
            h = self.network.video(still)
        side = self.view.side // self.network.config.patch[1]
        return Encoding(pooled=h[:, 0], tokens=h[:, 1:], grid=(side, side))

    def forward(self, images: Tensor) -> Encoding:
        return self.encode(images)

    @torch.no_grad()
    def pooled(self, clips: Clips) -> dict[str, Tensor]:
        """What each backbone makes of clips, [N, width], for classifiers: of their "video" and of their "audio"."""
        with uncast(clips.video.device):
            return {
                "video": self.network.video(clips.video)[:, 0],
                "audio": self.network.audio(clips.audio)[:, 0],
            }

    @torch.no_grad()
    def joined(self, pooled: Mapping[str, Tensor], words: Tensor) -> Joint:
        """Unit vectors in the common spaces, of what `pooled` made and of captions, int64 [M, L]."""
        with uncast(words.device):
            joint = self.network.joined(pooled["video"], pooled["audio"], self.network.text(words)[:, 0])
        return Joint(*(F.normalize(each, dim=-1) for each in joint))

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts as unit vectors in the space of video and words, [N, width]: to search videos by."""
        like = next(self.network.parameters())
        words = encoded(self.words, texts, self.network.config.length).to(like.device)
        return F.normalize(self.network.bridge.text(self.network.text(words)[:, 0]), dim=-1)

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        return {
            "class": type(self).__name__,
            "words": json.dumps(self.words.describe()),
            "network": self.network.describe(),
        }
