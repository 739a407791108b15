"""Meta CLIP's released program: matches, thresholds, probabilities; features, loss and slopes of tiny networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagewright.data.curation.balancing import chances, keeping, p_to_t, t_to_p
from imagewright.interop.clip import official_name
from imagewright.methods.metaclip2 import contrast
from imagewright.networks import CLIP, CLIPConfig
from imagewright.networks.clip import SIZES

HERE = Path(__file__).parent / "data"
CURATION: dict[str, Any] = json.loads((HERE / "metaclip2_curation.json").read_text())
NETWORK: dict[str, Any] = json.loads((HERE / "metaclip2_network.json").read_text())


@pytest.mark.parametrize("row", CURATION["counts"])
def test_thresholds_and_probabilities(row: dict[str, Any]) -> None:
    counts = np.array(row["counts"])
    for t, p in row["t_to_p"].items():
        assert t_to_p(counts, int(t)) == pytest.approx(p, abs=1e-15)
    for p, t in row["p_to_t"].items():
        assert p_to_t(counts, float(p)) == t
    for t, wanted in row["probs"].items():
        np.testing.assert_allclose(chances(counts, int(t)), wanted, rtol=1e-14)
    kept = row["keep"]
    assert keeping(chances(counts, kept["t"]), kept["matched"]) == pytest.approx(kept["prob"], rel=1e-12)


def test_matches() -> None:
    pytest.importorskip("ahocorasick")
    from imagewright.data.curation.matching import Matcher

    matcher = Matcher(CURATION["entries"])
    for each in CURATION["captions"]:
        assert matcher.match(each["caption"], each["language"]) == each["matched"], each


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_programs_parameters(size: str) -> None:
    with torch.device("meta"):
        network = CLIP(CLIPConfig(**SIZES[size]))
    assert sum(p.numel() for p in network.parameters()) == NETWORK["parameters"][size]


@pytest.mark.parametrize("activation", ["exact_gelu", "quick_gelu"])
def test_features_loss_and_slopes(activation: str) -> None:
    wanted = NETWORK[activation]
    config = CLIPConfig(img_resolution=8, patch=4, width=16, depth=2, head_width=8, embed=6, vocabulary=20, length=6,
                        text_width=12, text_depth=2, text_heads=3, activation=activation)  # fmt: skip
    network = CLIP(config).double()
    names = {official_name(name): name for name, _ in network.named_parameters()}
    with torch.no_grad():
        for k, name in enumerate(sorted(names)):
            parameter = network.get_parameter(names[name])
            parameter.copy_(filled(k, parameter.shape))
        network.log_scale.fill_(1.5)
    images = filled(50, torch.Size((3, 3, 8, 8)), 1.0)
    tokens = torch.tensor(NETWORK["tokens"])
    made = network.image(images).pooled, network.text(tokens)
    pictures, texts = (torch.nn.functional.normalize(each, dim=1) for each in made)
    for found, told in ((pictures, "images"), (texts, "texts")):
        np.testing.assert_allclose(found.detach().numpy(), wanted[told], rtol=1e-6, atol=1e-9)
    loss = contrast(pictures, texts, pictures, texts, network.log_scale.exp(), slice(0, 3))["loss"].mean()
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-9)
    loss.backward()
    for name, slope in wanted["slopes"].items():
        gradient = network.get_parameter(names[name]).grad
        assert gradient is not None and gradient.norm().item() == pytest.approx(slope, rel=1e-6), name


def filled(k: int, shape: torch.Size, scale: float = 0.3) -> Tensor:
    numbers = torch.arange(shape.numel(), dtype=torch.float64)
    return (scale * torch.sin(0.7 * numbers + k)).reshape(shape)
