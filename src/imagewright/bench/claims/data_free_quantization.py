"""Data-free quantization: pictures that a classifier responds to set the ranges, and its norms are taken anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, Rows, by_how_much
from imagewright.bench.claims.sequences import fitted
from imagewright.data import from_uint8, open_images
from imagewright.models.classifier import Classifier
from imagewright.networks.quantized import Quantized, Quantizing, layers_of, simulate
from imagewright.networks.wide_resnet import WideResNet, WideResNetConfig
from imagewright.noise import StepNoise, derive_seed
from imagewright.tuning.quantization import Quantization, answer_loss, measure_ranges, quantize, recorded
from imagewright.tuning.synthesis import Synthesis, matched_pictures, noise_pictures, responding_pictures

UPDATES, BATCH, RATE = 400, 64, 1e-2
"""Of the classifier; the first that were tried."""
LEARNT = 900
"""Digits of 1,797 that the classifier learns; all others are held out."""
PICTURES = 256
"""Of every calibration."""
LEVELS = ((4, 4), (3, 3), (2, 4))
"""Bits of a weight and of a layer's input."""
NAMES = {"none": "", "reestimate": " + ABN", "paired": " + paired ABN"}
QUANTILE = 0.9999
"""Of a layer's inputs on held-out digits: what a range should reach."""


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All digits in an order of the seed's, [1797, 1, 8, 8] in [-1, 1], and their classes."""
    sets = [open_images("digits", split=split) for split in ("train", "test")]
    pictures = torch.cat([from_uint8(images.images()) for images in sets])
    labels = torch.cat([torch.from_numpy(images.labels) for images in sets])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed, 3)))
    return pictures[order], labels[order]


def trained(pictures: Tensor, labels: Tensor, seed: int, updates: int) -> Classifier:
    """A wide residual network of two blocks."""

    def make() -> nn.Module:
        sizes: dict[str, Any] = {"img_resolution": 8, "in_channels": 1, "num_classes": 10, "blocks": 1, "widen": 1}
        return Classifier(WideResNet(WideResNetConfig(**sizes)))

    def draw(generator: torch.Generator, n: int) -> Tensor:
        return torch.randint(len(labels), (n,), generator=generator)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(pictures[rows]).logits, labels[rows])

    model = fitted(make, draw, loss, seed=seed, updates=updates, batch=BATCH, rate=RATE)
    assert isinstance(model, Classifier)
    return model.requires_grad_(False)


@torch.no_grad()
def wrong(model: Classifier, pictures: Tensor, labels: Tensor) -> float:
    """Share of wrong answers, in percent."""
    logits = model(pictures).logits
    assert logits is not None
    return 100 * float((logits.argmax(1) != labels).double().mean())


def seen(model: Classifier, pictures: Tensor) -> list[Any]:
    """The network's calls on pictures."""
    ((_, calls),) = recorded(model, lambda: model(pictures))
    return calls


@torch.no_grad()
def reach(model: Classifier, pictures: Tensor, quantile: float | None = None) -> Tensor:
    """Upper ends of all layers' ranges on pictures, or a quantile of their inputs."""
    network = copy.deepcopy(model.network)
    simulate(network, Quantized(bits=8, activation_bits=8))
    layers = [layer for _, layer in layers_of(network)][1:]  # the first has no range
    (call,) = seen(model, pictures)
    if quantile is None:
        measure_ranges(network, call)
        return torch.stack([layer.high[0] for layer in layers])
    found: dict[Quantizing, Tensor] = {}
    for _, layer in layers_of(network):
        layer.watch = lambda one, x: found.update({one: x.double().flatten().sort().values[int(quantile * x.numel())]})
    network(*call)
    return torch.stack([found[layer] for layer in layers]).float()


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Wrong answers of the quantized classifier for each source of its ranges, with and without ABN."""
    full = budget == "full"
    pictures, labels = digits(seed)
    model = trained(pictures[:LEARNT], labels[:LEARNT], seed, UPDATES if full else 2)
    count, config = (PICTURES if full else 16), Synthesis() if full else Synthesis(iterations=1)
    matched = matched_pictures(model, count, config, StepNoise(seed, 5))
    sources = {
        "noise": noise_pictures(model, count, StepNoise(seed, 4)).pictures,
        "matched": matched.pictures,
        "AAC": responding_pictures(model, matched, count, config, StepNoise(seed, 6)).pictures,
        "real": pictures[:count],
    }
    norms: Mapping[str, Tensor] = {**sources, "AAC": matched.pictures}
    held_out = [each[LEARNT : None if full else LEARNT + 64] for each in (pictures, labels)]
    true = reach(model, held_out[0], QUANTILE)
    rows = [Row(name="float", score=wrong(model, *held_out), cost=32)]
    for source, shown in sources.items():
        off = float((reach(model, shown) / true).log().abs().mean())
        for bits, activation_bits in LEVELS:
            for mended in ("none", "reestimate", "paired"):
                told = Quantization(bits=bits, activation_bits=activation_bits, norms=mended)
                few = copy.deepcopy(model)
                quantize(few.network, seen(model, shown), told, norms=seen(model, norms[source]), loss=answer_loss)
                name = f"{source}{NAMES[mended]}, W{bits}A{activation_bits}"
                rows.append(Row(name=name, score=wrong(few, *held_out), cost=bits, more={"off": off}))
    return rows


def half_the_gap(rows: Rows) -> float:
    """By how much AAC and ABN close more than half of what real digits and ABN would."""
    before = rows.score("matched, W2A4")
    return (before - rows.score("AAC + ABN, W2A4")) - (before - rows.score("real + ABN, W2A4")) / 2


CLAIM = Claim(
    key="data_free_quantization",
    paper="2204.04215",
    headline="ResNet-18 on ImageNet in 4 bits without data: 64.33 % top-1, 3.7 points above the best before",
    miniature="A wide residual network of two blocks learns 900 digits and is quantized without any; 897 others say "
    "what that costs. Ranges of the layers' inputs come from 256 pictures of noise, of the batch norms' statistics "
    "(matched), or such that the network also responds to as strongly as it can (AAC); real digits are the bound. ABN "
    "takes the norms' statistics anew from the matched pictures (of noise and of real digits from these), as the paper "
    "has it, or paired, as we add. Equal weights, quantizer and number of pictures; nothing is trained after it.",
    measure="wrong answers, %",
    cost="bits of a weight",
    run=run,
    checks=(
        Check(
            says="ABN has 1 point fewer wrong answers, at two bits of a weight",
            effect=by_how_much("AAC + ABN, W2A4", "AAC, W2A4"),
            margin=1.0,
        ),
        Check(
            says="ABN has fewer wrong answers at three bits",
            effect=by_how_much("AAC + ABN, W3A3", "AAC, W3A3"),
        ),
        Check(
            says="AAC's ranges are nearer to held-out digits' than matched pictures' (mean |ln| of their ratio)",
            effect=by_how_much("AAC, W4A4", "matched, W4A4", "off"),
        ),
        Check(
            says="with ABN, AAC's ranges have fewer wrong answers than matched pictures', at two bits",
            effect=by_how_much("AAC + ABN, W2A4", "matched + ABN, W2A4"),
        ),
        Check(says="AAC and ABN close half of the gap to real digits and ABN, at two bits", effect=half_the_gap),
        Check(
            says="statistics of noise ruin: ABN from matched pictures has 1 point fewer wrong answers, at four bits",
            effect=by_how_much("matched + ABN, W4A4", "noise + ABN, W4A4"),
            margin=1.0,
        ),
    ),
)
