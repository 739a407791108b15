"""ARPG's network, loss, gradient and decoding against numbers of the released program.

data/arpg.json says from which commit its numbers are and how weights and inputs are made. Bar: 1e-8, as both compute in
float64.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.models.random_order import RandomOrderModel
from imagewright.models.tokens import PixelCodec, negative_log
from imagewright.networks import ARPG, ARPGConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import RandomizedParallel
from imagewright.types import Condition

REFERENCE = json.loads((Path(__file__).parent / "data" / "arpg.json").read_text())
VALUES, LENGTH = 5, 16
COND = Condition(label=torch.tensor([2, 0]))


def normal(key: str, shape: list[int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)))


@pytest.fixture(scope="module")
def network() -> ARPG:
    sizes: dict[str, Any] = {"values": VALUES, "length": LENGTH, "label_dim": 3, "width": 16, "depth": 4, "heads": 2}
    net = ARPG(ARPGConfig(**sizes, hidden_multiple=4)).double().eval()
    for owner, module in net.named_modules():
        for name, p in module.named_parameters(recurse=False):
            drawn = normal(f"{owner}.{name}".lstrip("."), list(p.shape))
            norm = 0.1 * drawn + isinstance(module, nn.RMSNorm)
            p.data = drawn / math.sqrt(math.prod(p.shape[1:])) if p.ndim > 1 else norm
    return net


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_logits_loss_and_gradient_are_the_released_ones(network: ARPG) -> None:
    tokens, order = torch.tensor(REFERENCE["tokens"]), torch.tensor(REFERENCE["order"])
    assert torch.equal(order, normal("order", [2, LENGTH]).argsort(1))
    logits = network(tokens, None, COND, order)
    close(logits[:, [0, 1, 9, 15]].flatten(), REFERENCE["logits"])
    close(logits.mean(), REFERENCE["mean"])
    close(logits.std(unbiased=False), REFERENCE["std"])
    loss = negative_log(logits, tokens.gather(1, order)).mean()
    close(loss, REFERENCE["loss"])
    loss.backward()
    for name, norm in REFERENCE["gradients"].items():
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        close(gradient.norm(), norm)
    network.zero_grad()


class Same:
    """The order of the released run, in every image, then its uniform numbers."""

    def __init__(self) -> None:
        self.draws = iter([normal("order", [2, LENGTH])[:1].expand(2, -1), normal("uniform", [2, LENGTH]) % 1])

    def uniform(self, like: Tensor) -> Tensor:
        return next(self.draws)


class Heard(RandomOrderModel):
    """Keeps the last answers."""

    def ask(self, places: Tensor, cache: Any) -> Tensor:
        self.answers = super().ask(places, cache)
        self.sizes.append(places.shape[1])
        return self.answers


@pytest.mark.parametrize("name", REFERENCE["drawn"])
def test_what_is_drawn_with_guidance_is_what_the_released_program_draws(name: str, network: ARPG) -> None:
    schedule, steps = name.split()
    sampler, said = RandomizedParallel(num_steps=int(steps), schedule=schedule, guidance=3.0), REFERENCE["drawn"][name]
    model = Heard(network, PixelCodec(4, 1, VALUES), 0.1)
    model.sizes = []  # type: ignore[assignment]
    unknown = torch.full((2, LENGTH), VALUES)
    drawn = sampler.fill(model, unknown, COND, noise=Same())  # type: ignore[arg-type]
    assert drawn.tolist() == said["tokens"] and model.sizes == said["sizes"]
    told, plain = model.answers.chunk(2)
    last = torch.log_softmax(plain + 3.0 * (told - plain), -1)
    close(last.flatten()[:10], said["last"])


def test_steps_are_as_large_as_the_released_ones() -> None:
    for name, said in REFERENCE["sizes"].items():
        schedule, tokens, steps = name.split()
        sizes = RandomizedParallel(num_steps=int(steps), schedule=schedule).sizes(int(tokens))
        assert (sizes if len(sizes) <= 20 else sizes[:8] + sizes[-8:]) == said, name


@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"), [("L", 24, 1024, 16), ("XL", 36, 1280, 20), ("XXL", 48, 1536, 24)]
)
def test_parameter_counts_are_those_of_the_released_networks(name: str, depth: int, width: int, heads: int) -> None:
    sizes: dict[str, Any] = {"values": 16384, "length": 256, "label_dim": 1000}
    with torch.device("meta"):
        net = ARPG(ARPGConfig(**sizes, depth=depth, width=width, heads=heads))
    unused = width  # the vector that no released program reads
    assert sum(p.numel() for p in net.parameters()) + unused == REFERENCE["parameters"][f"ARPG-{name}"]


def test_the_published_recipe_is_the_released_programs() -> None:
    run = RECIPES["arpg-imagenet256"]()
    epoch, t, o, net, sampler = 1_281_167, run.training, run.training.optimizer, run.network, run.sampler
    assert (t.batch, t.total_images, t.precision) == (1024, 400 * epoch, "bf16")
    assert run.data.xflip  # the codes it is released with are of each picture and of its mirror image, one at random
    assert (o.kind, o.lr, o.betas, o.weight_decay, o.clip_norm) == ("adamw", 4e-4, (0.9, 0.95), 0.05, 1.0)
    assert (o.lr_ramp_images, o.lr_cooldown_images, o.lr_cooldown_shape) == (100 * epoch, 300 * epoch, "cosine")
    assert (net.depth, net.width, net.heads, net.hidden_multiple) == (24, 1024, 16, 256)
    assert (net.dropout, net.embedding_dropout, net.class_turn, run.method.label_dropout) == (0.1, 0.1, "zero", 0.1)
    assert (sampler.num_steps, sampler.schedule, sampler.guidance, sampler.ramp) == (64, "arccos", 5.0, "linear")
    assert (sampler.temperature, sampler.causal) == (1.0, False)
