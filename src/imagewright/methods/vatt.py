"""VATT's training: video against sound, and video against several captions (Akbari et al. 2021, arXiv 2104.11178).

Networks   encoder (trained, the product; it has no average, as published): backbones and the bridge to common spaces.
Loss       (a MIL-NCE(video, captions) + b NCE(video, sound)) / (a + b), of unit vectors, temperature 0.07. Any of a
           clip's captions may be the one that fits: their exponentials are summed within the logarithm.
Negatives  all that does not belong together in the batch, over all processes, in both directions. asymmetric (the
           released default): one logarithm, whose denominator has the row and the column of a clip, the positives
           in both, so that the least loss is log 2. symmetric: a logarithm for each direction, added.
Masks      A clip without text shows the words' network padding alone, is no negative as a text, and its loss is
           nothing; the others' are larger by all / those with text. Its *video* stays a negative for others' captions,
           as in the released code. Silent clips likewise.
Dropped    Half of the tokens of video and of sound, the same for the whole batch, in training (DropToken).
Clips      Cut out the same in all frames, flipped, colours changed; sound with a little noise.
Optimiser  the run's, published: Adam, eps 1e-7, no decay; 1e-4 to 5e-5 by half a cosine, 5,000 steps of warm-up of
           500,000, 2048 clips a step. (The paper: a quarter of a cosine, 10,000 steps.)
Source     The released code: google-research/google-research, folder vatt (utils/train/objectives.py and schedules.py,
           configs, data/processing.py), which decides; its defaults are those here.
Departs    Where a batch is in micro-batches, negatives and norms are those of a micro-batch, in all processes. Losses
           are scaled by all / valid of the whole, and all processes drop the same tokens (there each replica has its
           own of either). Cut-outs are those of `vcmamba`, by default none (there, by default, a random square of a
           video whose sides are stretched a little). Saturation mixes with the channels' mean and hue is a turn about
           the grey axis (there both of HSV). A caption's last word is a mark of its end, and signs part words (there
           is no mark, and signs are left out). No term of sound against captions (there of weight 0).
           `captions_used=1` is not the paper's: plain NCE against one caption drawn at random, for comparison.
Checked    the released objective's numbers; closed forms; one caption is NCE; what is masked has no gradient; two
           processes learn what one does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.checks import require_number, require_positive
from imagewright.data.clips import Clips, ClipShape
from imagewright.data.words import Vocabulary
from imagewright.gathering import gathered, own
from imagewright.methods.vcmamba import cut_out
from imagewright.models.vatt import VATTEncoder
from imagewright.networks.vatt import VATT, Joint
from imagewright.noise import StepNoise
from imagewright.precision import uncast
from imagewright.types import Clock, Event, Parts, Trained, Update, UserError

Layout = Literal["asymmetric", "symmetric"]
FAR = 1e9
"""Taken off the similarity of what is masked."""
ASPECT = 0.5
"""Least ratio of a cut-out's sides."""
BRIGHTNESS, CONTRAST, HUE = 32 / 255, 0.4, 0.2
"""Largest changes of colours; contrast's is saturation's, too. Of the colours of how many clips: 0.8."""
COLOURED = 0.8


@dataclass(frozen=True, kw_only=True)
class VATTTraining:
    """Bring a clip's video, sound and captions together, and others' apart."""

    product: ClassVar[str] = "encoder"

    layout: Layout = "asymmetric"
    """Of negatives."""
    temperature: float = 0.07
    text_weight: float = 1.0
    """Of video against captions."""
    audio_weight: float = 1.0
    """Of video against sound."""
    keep_tokens: float = 0.5
    """Share of the tokens of video and sound that are seen in training; 1 = all."""
    captions_used: int = 0
    """0 = all captions of a clip may fit (MIL-NCE); 1 = one of them, drawn at random, is taken to (NCE)."""
    area: float = 1.0
    """Least share of the picture that is cut out and enlarged; 1 = none is (published: 0.08)."""
    flip: bool = False
    """Mirror half of the clips."""
    colours: bool = False
    """Change colours: brightness, contrast, saturation and hue, alike in all frames."""
    audio_noise: float = 0.01
    """Deviation of what is added to sounds, in units of their loudest moment."""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise UserError(f"method.layout is {self.layout!r}; allowed: {', '.join(get_args(Layout))}")
        require_positive("method.temperature", self.temperature)
        for name in ("text_weight", "audio_weight"):
            require_number(f"method.{name}", getattr(self, name), 0, 1e6)
        if self.text_weight + self.audio_weight == 0:
            raise UserError("method.text_weight and method.audio_weight are both 0; nothing would be learnt")
        require_number("method.keep_tokens", self.keep_tokens, 0.01, 1)
        require_number("method.area", self.area, 0.01, 1)
        require_number("method.audio_noise", self.audio_noise, 0, 1)
        if self.captions_used not in (0, 1):
            raise UserError(f"method.captions_used is {self.captions_used!r}; it must be 0 (all) or 1")

    def sizes(self, vocabulary: Vocabulary, shape: ClipShape) -> dict[str, int]:
        """What the network takes from the clips."""
        return {
            "words": vocabulary.values,
            "length": shape.words,
            "frames": shape.frames,
            "samples": shape.samples,
        }

    def parts(self, *, network: nn.Module, vocabulary: Vocabulary) -> Parts:
        """network: a `VATT`. Raises UserError for another."""
        return Parts(encoder=Trained(module=VATTEncoder(network, json.dumps(vocabulary.describe())), ema=False))

    def step(self, parts: Any, batch: Clips, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update."""
        network: VATT = parts.encoder.network
        heard, told = batch.heard, batch.told
        clips = replace(batch, video=self._seen(batch.video, noise), audio=self._listened(batch.audio, noise))
        captions = self._captions(clips.captions, noise)
        keep = {name: kept(count, self.keep_tokens, noise) for name, count in network.config.tokens.items()}
        pooled = (
            network.video(clips.video, keep["video"])[:, 0],
            network.audio(clips.audio, keep["audio"])[:, 0],
            _by_clip(network.text(captions.transpose(0, 1).flatten(0, 1))[:, 0], len(heard)),
        )
        video, audio, text = (gathered(each) for each in pooled)
        if len(video) < 2:
            raise UserError("a micro-batch has one clip, and nothing to compare it with; give training.batch >= 2")
        joint = network.joined(video, audio, text.flatten(0, 1))
        losses = self.losses(joint, gathered(heard), gathered(told), own(len(heard)))
        weights = {"text": self.text_weight, "audio": self.audio_weight}
        loss = sum((weights[name] * losses[name] for name in weights), torch.zeros_like(heard))
        yield Update("encoder", loss / sum(weights.values()), parts=losses)

    def losses(self, joint: Joint, heard: Tensor, told: Tensor, rows: slice) -> dict[str, Tensor]:
        """Of the rows' clips among all: video against captions ("text"), and against sound ("audio"), [rows] each."""
        with uncast(heard.device):
            fine, audio, coarse, text = (F.normalize(each.float(), dim=-1) for each in joint)
            captions = text.view(len(fine), -1, text.shape[1])
            return {
                "text": nce(coarse, captions, told, rows, self.temperature, self.layout),
                "audio": nce(fine, audio[:, None], heard, rows, self.temperature, self.layout),
            }

    def _captions(self, captions: Tensor, noise: StepNoise) -> Tensor:
        """[N, K, L], or [N, 1, L]."""
        if not self.captions_used:
            return captions
        n, count = captions.shape[:2]
        chosen = noise.integers(count, captions[:, 0, 0])
        return captions[torch.arange(n, device=captions.device), chosen][:, None]

    def _seen(self, video: Tensor, noise: StepNoise) -> Tensor:
        """[N, C, F, H, W], all frames alike."""
        first = video[:, 0, 0, 0, 0]
        if self.area < 1:
            flat = video.flatten(1, 2)
            video = cut_out(flat, self.area, noise, ASPECT).view_as(video)
        if self.flip:
            mirrored = noise.uniform(first) < 0.5
            video = torch.where(mirrored[:, None, None, None, None], video.flip(-1), video)
        return coloured(video, noise) if self.colours else video

    def _listened(self, audio: Tensor, noise: StepNoise) -> Tensor:
        if not self.audio_noise:
            return audio
        return audio + self.audio_noise * audio.abs().amax(1, keepdim=True) * noise.normal(audio)


def _by_clip(rows: Tensor, clips: int) -> Tensor:
    """[K N, D], a block of rows for each caption of all clips, as [N, K, D]; networks see them so for their noise."""
    return rows.view(-1, clips, rows.shape[1]).transpose(0, 1)


def kept(count: int, share: float, noise: StepNoise) -> Tensor | None:
    """Which of so many tokens are seen, int64 [share of them, rounded down], alike in the whole batch; None = all."""
    if share == 1:
        return None
    return noise.common(torch.empty(count)).argsort()[: max(int(share * count), 1)]


def nce(video: Tensor, other: Tensor, valid: Tensor, rows: slice, temperature: float, layout: Layout) -> Tensor:
    """-log of the share that belongs together, of the clips at `rows` among all N; [rows].

    video: [N, D]; other: [N, K, D], K candidates of each clip, of which any may fit; unit vectors. valid: [N], 1 where
    a clip has candidates at all. Clips that have none count nothing, and the others more, so that the mean over all is
    that over the valid.
    """
    here = torch.arange(len(video), device=video.device)[rows]
    across = torch.einsum("nd,mkd->nmk", video[rows], other) / temperature
    down = torch.einsum("nkd,md->nmk", other[rows], video) / temperature
    positive = across[torch.arange(len(here), device=here.device), here].logsumexp(1)
    far = FAR / temperature * (1 - valid)
    across = (across - far[None, :, None]).flatten(1)
    down = (down - far[rows][:, None, None]).flatten(1)
    if layout == "asymmetric":
        loss = torch.cat([across, down], 1).logsumexp(1) - positive
    else:
        loss = across.logsumexp(1) + down.logsumexp(1) - 2 * positive
    return loss * valid[rows] * (len(valid) / valid.sum().clamp_min(1))


def coloured(video: Tensor, noise: StepNoise) -> Tensor:
    """Four of five clips [N, C, F, H, W] with other brightness, contrast and, of three channels, saturation and hue."""
    like = video[:, :1, :1, :1, :1]
    chosen, light, contrast, saturation, hue = (noise.uniform(like) for _ in range(5))
    changed = video + 2 * BRIGHTNESS * (2 * light - 1)
    if video.shape[1] == 3:
        changed = _stretched(changed, changed.mean(1, keepdim=True), 1 + CONTRAST * (2 * saturation - 1))
    changed = _stretched(changed, changed.mean((3, 4), keepdim=True), 1 + CONTRAST * (2 * contrast - 1))
    if video.shape[1] == 3:
        changed = _turned(changed, 2 * torch.pi * HUE * (2 * hue - 1))
    return torch.where(chosen < COLOURED, changed.clamp(-1, 1), video)


def _stretched(x: Tensor, around: Tensor, factor: Tensor) -> Tensor:
    return around + factor * (x - around)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Colours turned about the grey axis (Rodrigues)."""
    grey = x.mean(1, keepdim=True)
    across = (x.roll(-1, 1) - x.roll(1, 1)) / 3**0.5
    return grey + angle.cos() * (x - grey) + angle.sin() * across
