"""MaskGIT's and MD4's networks and losses against numbers of the released programs.

data/token_models.json says from which commits its numbers are and how weights and inputs are made. Bar: 1e-6, but for
MD4's networks, whose sines the released program has in single precision.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.methods.adversary import gradient_penalty
from imagewright.methods.maskgit import cross_entropies
from imagewright.methods.vq_tokenizer import entropy_loss
from imagewright.networks import (
    PixelUNet,
    PixelUNetConfig,
    TokenTransformer,
    TokenTransformerConfig,
    VQAutoencoder,
    VQAutoencoderConfig,
)
from imagewright.networks.blur_discriminator import BlurDiscriminator
from imagewright.networks.layers import grid_sines
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment
from imagewright.types import Condition, DataSpec

REFERENCE = json.loads((Path(__file__).parent / "data" / "token_models.json").read_text())


def normal(key: str, shape: list[int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return torch.from_numpy(np.asarray(generator.standard_normal(shape)))


def by_rule(network: nn.Module) -> nn.Module:
    network.double().eval()
    for owner, module in network.named_modules():
        scales = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        for name, p in module.named_parameters(recurse=False):
            drawn = normal(f"{owner}.{name}".lstrip("."), list(p.shape))
            wide = drawn / math.sqrt(math.prod(p.shape[1:]))
            p.data = wide if p.ndim > 1 else 0.1 * drawn + (scales and name == "weight")
    return network


def close(found: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found.detach().double(), torch.tensor(expected).double(), rtol=1e-5, atol=atol)


def test_the_tokenizer_answers_as_the_released_one() -> None:
    config = VQAutoencoderConfig(
        img_resolution=8, in_channels=3, channel_mult=(1, 2), num_blocks=1, codebook_size=7, codebook_dim=5
    )
    images, q = by_rule(VQAutoencoder(config))(normal("images", [2, 3, 8, 8]))
    said = REFERENCE["vq"]
    assert q.tokens.tolist() == said["tokens"]
    close(images.mean(), said["mean"])
    close(images.std(unbiased=False), said["std"])
    close(images[0, :, :2, 0].T.flatten(), said["first"])
    squares = (q.codes - q.z).square().mean()
    close(squares, said["codebook"])
    close(0.25 * squares, said["commitment"])
    close(0.1 * entropy_loss(q.distances.float(), 0.01).mean(), said["entropy"])
    distances = normal("distances", [2, 4, 7]).square().float()
    close(entropy_loss(distances, 0.5).mean(), REFERENCE["entropy_soft"])


def test_the_discriminator_answers_and_is_penalised_as_the_released_one() -> None:
    network = by_rule(BlurDiscriminator(32, 3, 2, "image"))
    said = REFERENCE["disc"]
    real, fake = normal("real", [2, 3, 32, 32]).requires_grad_(True), normal("fake", [2, 3, 32, 32])
    logits, refused = network(real), network(fake)
    close(logits[:, 0], said["real"], 1e-9)
    close(refused[:, 0], said["fake"], 1e-9)
    close((nn.functional.softplus(-logits) + nn.functional.softplus(refused)).mean(), said["loss"])
    close(10 * gradient_penalty(logits, real).mean(), said["r1"], 1e-10)
    close(nn.functional.softplus(-refused).mean(), said["generator"])


def test_the_transformer_answers_as_the_released_one() -> None:
    config = TokenTransformerConfig(values=5, length=6, label_dim=3, width=16, depth=2, heads=4)
    tokens = torch.tensor([[0, 5, 3, 5, 5, 2], [5, 1, 1, 4, 5, 0]])
    logits = by_rule(TokenTransformer(config))(tokens, None, Condition(label=torch.tensor([1, 2])))
    said = REFERENCE["tok"]
    close(logits[0, :2].flatten(), said["logits"])
    close(logits.mean(), said["mean"])
    close(logits.std(unbiased=False), said["std"])


def test_the_masked_cross_entropy_is_the_released_one() -> None:
    tokens = torch.tensor([[0, 4, 2, 1], [3, 3, 0, 2]])
    masked = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1]])
    smoothed, _ = cross_entropies(normal("logits", [2, 4, 5]), tokens, 0.1)
    close(((smoothed * masked).sum(1) / masked.sum(1)).mean(), REFERENCE["masked_loss"])


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_pixel_networks_answer_as_the_released_ones(name: str) -> None:
    config = PixelUNetConfig(img_resolution=4, in_channels=3, values=5, num_blocks=1)
    if name == "dit":
        patches = {"transformer_depth": 1, "transformer_width": 24, "transformer_heads": 3}
        config = PixelUNetConfig(img_resolution=4, in_channels=3, values=5, num_blocks=1, label_dim=2, **patches)
    tokens = torch.tensor([[(7 * i + j) % 6 for i in range(48)] for j in range(2)])
    logits = by_rule(PixelUNet(config))(tokens, torch.tensor([0.3, 0.9]), Condition(label=torch.tensor([1, 0])))
    said = REFERENCE[name]
    close(logits[0, :2].flatten(), said["first"], 1e-4)
    close(logits[1, -2:].flatten(), said["last"], 1e-4)
    close(logits.mean(), said["mean"], 1e-5)
    close(logits.std(unbiased=False), said["std"], 1e-4)


def test_positions_of_patches_begin_as_the_released_ones() -> None:
    close(grid_sines(3, 8), REFERENCE["sines"])


def size(made: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in made().parameters())


def recipe(name: str) -> Experiment:
    return RECIPES[name]()


def test_parameter_counts_are_those_of_the_released_networks() -> None:
    def pixels(name: str, side: int, label_dim: int = 0) -> int:
        config = recipe(name).network
        arguments = {**vars(config), "img_resolution": side, "label_dim": label_dim}
        return size(lambda: PixelUNet(PixelUNetConfig(**arguments)))

    assert pixels("md4-cifar10", 32) == 28_427_520
    assert pixels("md4-imagenet64", 64) == 198_279_680
    assert pixels("md4-imagenet64-classes", 64, 1000) == 205_113_856 + 256  # and a vector for no class

    def tokenizer(name: str, side: int) -> int:
        arguments = {**vars(recipe(name).network), "img_resolution": side, "in_channels": 3}
        return size(lambda: VQAutoencoder(VQAutoencoderConfig(**arguments)))

    assert tokenizer("vq-imagenet256", 256) == 54_515_587
    assert tokenizer("vq-imagenet64", 64) == 47_873_539

    def judge(name: str, side: int) -> int:
        spec = DataSpec(name="imagenet", resolution=side, channels=3)
        network = VQAutoencoderConfig(img_resolution=side, in_channels=3)
        return size(lambda: recipe(name).method.parts(network=VQAutoencoder(network), spec=spec).discriminator)

    assert judge("vq-imagenet256", 256) == 23_998_017
    assert judge("vq-imagenet64", 64) == 23_408_897
    arguments = {**vars(recipe("maskgit-imagenet256").network), "values": 1024, "length": 256, "label_dim": 1000}
    transformer = size(lambda: TokenTransformer(TokenTransformerConfig(**arguments)))
    # A vector for no class; no bias of logits for the classes and the unknown token.
    assert transformer == 172_457_193 + 768 - 1001
