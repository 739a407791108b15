"""Pre-training on events against numbers of the published program: a whole step, and what it is made of.

data/event_pretraining.json says by which rule weights and inputs are made, and from which commit the numbers are.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.data.events import EventPairs
from imagewright.methods.event_classification import EventClassification
from imagewright.methods.event_pretraining import EventPretraining, EventViews, balanced, projected
from imagewright.models.event_encoder import EventEncoder
from imagewright.networks.event_vit import EventViT, EventViTConfig
from imagewright.noise import StepNoise
from imagewright.types import Clock, Condition, Follow, Update

OFFICIAL = json.loads((Path(__file__).parent / "data" / "event_pretraining.json").read_text())
TINY = EventViTConfig(img_resolution=48, num_classes=3, width=8, depth=2, heads=2, head_norm=True)
UNIFORM = [
    ((torch.arange(36, dtype=torch.float64) * (2.1 + k)).sin() * 0.5 + 0.5).view(4, 9) * 0.98 + 0.01 for k in (0, 1)
]
NAMES = (
    ("network.patches.", "encoder_q.patch_embed.proj."),
    ("network.tokens", "encoder_q.tokens"),
    ("network.head.norm.", "head.0."),
    ("network.head.linear.", "head.1."),
    ("network.", "encoder_q."),
    ("contrast.event.", "encoder_q.event_head."),
    ("contrast.image.", "encoder_q.image_head."),
    ("contrast.event_predictor.", "pred1."),
    ("contrast.image_predictor.", "pred2."),
    ("contrast.teacher.", "to_event.0."),
    (".norm.weight", ".norm1.weight"),
    (".norm.bias", ".norm1.bias"),
    (".again.", ".norm2."),
    (".qkv.", ".attn.qkv."),
    (".out.", ".attn.proj."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.2.", ".mlp.fc2."),
)


def official(name: str) -> str:
    """The published program's name of a weight."""
    for ours, theirs in NAMES:
        if name.startswith(ours) or (ours.startswith(".") and ".blocks." in name):
            name = name.replace(ours, theirs, 1)
    return name


def filled(module: nn.Module, name_of: Any) -> Any:
    module.double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            key = name_of(name)
            at = torch.arange(weight.numel(), dtype=torch.float64)
            wave = (1.7 * at + zlib.crc32(key.encode()) % 1000).sin().view(weight.shape)
            weight.copy_(1 + 0.3 * wave if key.endswith("weight") and weight.ndim == 1 else 0.4 * wave)
    return module


def frames(k: int) -> Tensor:
    at = torch.arange(4 * 2 * 48 * 48, dtype=torch.float64)
    return ((0.013 * at * (k + 1)).sin() * (0.37 * at + k).sin()).clamp(min=0).view(4, 2, 48, 48) * 2 - 1


class Teacher(nn.Module):
    dim = 5

    def forward(self, images: Tensor) -> Tensor:
        return (torch.arange(20, dtype=torch.float64) * 1.3).sin().view(4, 5)


class Told(StepNoise):
    """Answers the numbers by which the published program drew its masks."""

    def __init__(self) -> None:
        self.left = list(UNIFORM)

    def uniform(self, like: Tensor) -> Tensor:
        return self.left.pop(0)


@dataclass(frozen=True, kw_only=True)
class Given(EventViews):
    """Views that are there already: the first, then the second."""

    def counts(self, events: Tensor, side: int, noise: StepNoise) -> Tensor:
        return events.new_zeros(4, 2, side, side)

    def view(self, frames_: Tensor, noise: Any) -> Tensor:
        return frames(2 - len(noise.left))


@pytest.fixture(scope="module")
def stepped() -> tuple[Update, Any]:
    method = EventPretraining(views=Given(), masking="published", momentum=0.75, hidden=12, out=6)
    teacher: Any = Teacher()
    parts: Any = method.parts(network=EventViT(TINY), teacher=teacher)
    filled(parts.encoder, official)
    parts.key.double().load_state_dict(parts.encoder.state_dict())
    events, images, label = torch.zeros(4, 1, 4).double(), torch.zeros(4, 3, 8, 8), torch.tensor([0, 2, 1, 2])
    batch = EventPairs(events, images, Condition(label=label))
    step = method.step(parts, batch, Told(), Clock(0, 0, 8))
    follow = next(step)
    assert follow == Follow("key", "encoder", 0.75)
    with torch.no_grad():
        for mine, theirs in zip(parts.key.parameters(), parts.encoder.parameters(), strict=True):
            mine.copy_(0.75 * 0.9 * mine + 0.25 * theirs)
    update = next(step)
    assert isinstance(update, Update)
    update.loss.mean().backward()
    return update, parts


@pytest.mark.parametrize("name", ["events", "pictures", "structure"])
def test_losses_are_the_published_ones(stepped: tuple[Update, Any], name: str) -> None:
    assert stepped[0].parts[name].mean().item() == pytest.approx(OFFICIAL[name], rel=1e-9)


def test_their_sum_and_its_gradient(stepped: tuple[Update, Any]) -> None:
    """The layer of the teacher's features learns from the structure alone; nothing reaches the key."""
    update, parts = stepped
    total = sum(OFFICIAL[n] * w for n, w in (("events", 1), ("pictures", 1), ("structure", 2), ("named", 1)))
    assert update.loss.mean().item() == pytest.approx(total, rel=1e-9)
    found = {official(n): p.grad.norm().item() for n, p in parts.encoder.named_parameters()}
    assert found == pytest.approx(OFFICIAL["gradients"], rel=1e-8, abs=1e-12)
    assert all(p.grad is None for p in parts.key.parameters())


def test_pieces() -> None:
    q, y = (torch.tensor(OFFICIAL[name], dtype=torch.float64) for name in ("q_image", "y"))
    along = projected(q, y)
    torch.testing.assert_close(along, torch.tensor(OFFICIAL["projected"], dtype=torch.float64))
    unit = torch.nn.functional.normalize(y, dim=1)
    found = balanced((unit @ unit.T / 0.1)[None])[0]
    torch.testing.assert_close(found, torch.tensor(OFFICIAL["sinkhorn"], dtype=torch.float64))


def test_a_tuned_network_answers_as_the_published_one_and_has_its_rates() -> None:
    config = replace(TINY, head_norm=False, learn_positions=True)
    method = EventClassification(layer_decay=0.75)
    encoder = EventEncoder(EventViT(config))

    def name_of(name: str) -> str:
        name = official(name).removeprefix("encoder_q.")
        return {"tokens": "cls_token", "positions": "pos_embed"}.get(name, name)

    filled(encoder, name_of).eval()
    torch.testing.assert_close(
        encoder.network(frames(0)).logits, torch.tensor(OFFICIAL["tuned"], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    of = method._groups(encoder)
    found = {name_of(n): [of(n, p)[0], 0.3 * of(n, p)[1]] for n, p in encoder.named_parameters()}
    assert found.keys() == OFFICIAL["groups"].keys()
    assert all(math.isclose(a, b) for n in found for a, b in zip(found[n], OFFICIAL["groups"][n], strict=True))
