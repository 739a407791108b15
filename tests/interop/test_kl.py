"""Released KL autoencoders come in by their own names, and what training files hold beside them is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imagewright.interop.kl import sizes_of
from imagewright.interop.reading import read_official
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig
from imagewright.types import UserError

SMALL = KLAutoencoderConfig(
    img_resolution=8, in_channels=3, latent_channels=4, model_channels=128, channel_mult=(1, 1), num_blocks=1,
    attn_resolutions=(),
)  # fmt: skip


def saved(folder: Path, network: KLAutoencoder) -> Path:
    """As the program writes it, under one key."""
    beside = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(5, 4, 1, 1)}
    torch.save({"state_dict": {**network.state_dict(), **beside}}, folder / "vavae.pt")
    return folder / "vavae.pt"


def test_a_released_autoencoder_is_recognised_and_answers_as_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = KLAutoencoder(SMALL).eval()
    found = read_official(saved(tmp_path, network), key="state_dict", config={"img_resolution": 8})
    assert found.kind == "kl" and isinstance(found.model, GaussianAutoencoder) and found.model.aligned == 0
    assert (found.spec.resolution, found.spec.channels, found.spec.num_classes) == (8, 3, 0)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    mean = network.encode(images)[0]
    torch.testing.assert_close(found.model.encode(images), mean)
    torch.testing.assert_close(found.model.decode(mean), network.decode(mean).clamp(-1, 1))


def test_shapes_tell_the_published_sizes() -> None:
    with torch.device("meta"):
        for published in (
            KLAutoencoderConfig(img_resolution=256, in_channels=3),
            KLAutoencoderConfig(img_resolution=256, in_channels=3, latent_channels=4, channel_mult=(1, 2, 4, 4),
                                attn_resolutions=()),
        ):  # fmt: skip
            told = KLAutoencoderConfig.from_json(sizes_of(KLAutoencoder(published).state_dict()))
            assert told == published


def test_a_narrower_one_is_refused_as_its_normalisation_is_another(tmp_path: Path) -> None:
    network = KLAutoencoder(KLAutoencoderConfig(**{**vars(SMALL), "model_channels": 64}))
    with pytest.raises(UserError, match="has 64 channels; below 128 its normalisation differs"):
        read_official(saved(tmp_path, network), key="state_dict")
