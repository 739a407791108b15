"""What images are compared in: names, encoders of one's own, DINOv2 and CLIP from a folder; the default for any set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagewright.cli.main import main
from imagewright.data import ImageSet, write_edm_zip
from imagewright.files import read_json
from imagewright.metrics.evaluate import evaluate
from imagewright.metrics.extractors import FOREIGN, find_extractor
from imagewright.metrics.features import ClassifierFeatures
from imagewright.metrics.perceptual import perceptual_network
from imagewright.metrics.train_encoder import train_encoder
from imagewright.models.view import fit
from imagewright.types import DataSpec, UserError


def noise(n: int, side: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (33, 3), (48, 3), (100, 1)])
def test_any_set_has_a_distance_whose_limits_are_said(side: int, channels: int) -> None:
    extractor = find_extractor(None, "holidays")
    report = evaluate(noise(12, side, channels), ImageSet.of(noise(12, side, channels, 1)), extractor, yardsticks=False)
    assert FOREIGN in report.notes and "fd_emoji" in report.scores
    assert (
        FOREIGN
        not in evaluate(
            noise(8, 64), ImageSet.of(noise(8, 64, seed=1)), find_extractor(None, "emoji64"), yardsticks=False
        ).notes
    )


def test_sizes_that_do_not_divide_are_interpolated_and_others_are_not() -> None:
    flat = np.full((1, 48, 48, 3), 200, np.uint8)
    assert torch.allclose(fit(flat, 32, 3), torch.full((1, 3, 32, 32), 200 / 127.5 - 1), atol=1e-6)
    exact = noise(1, 64)
    means = (
        torch.from_numpy(exact)
        .permute(0, 3, 1, 2)
        .float()
        .div(127.5)
        .sub(1)
        .unfold(2, 2, 2)
        .unfold(3, 2, 2)
        .mean((4, 5))
    )
    assert torch.allclose(fit(exact, 32, 3), means, atol=1e-6)


def shapes(n: int, side: int = 8) -> np.ndarray:
    """Disks and much larger squares at random places on grey, in equal numbers."""
    random = np.random.default_rng(3)
    images = np.full((n, side, side, 3), 128, np.uint8)
    y, x = np.mgrid[:side, :side]
    for i in range(n):
        cy, cx = random.uniform(3, side - 3, 2)
        inside = np.hypot(y - cy, x - cx) < 2 if i % 2 else np.maximum(abs(y - cy), abs(x - cx)) < 4
        images[i, inside] = random.integers(180, 256, 3)
    return images


def test_an_encoder_learns_classes_or_pictures(tmp_path: Path) -> None:
    pictures = shapes(32)
    labelled = train_encoder(
        ImageSet.of(pictures, [i % 2 for i in range(32)]), tmp_path / "classes.safetensors", steps=40
    )
    assert labelled["accuracy"]["train"]["class"] > 0.5
    known = ClassifierFeatures(tmp_path / "classes.safetensors")
    assert (known.name, known.num_classes, known.header["target"]) == ("classes", 2, "classes")
    train_encoder(ImageSet.of(pictures), tmp_path / "own.safetensors", steps=4)
    own = find_extractor(str(tmp_path / "own.safetensors"), "shapes")
    assert (own.name, own.num_classes, own.dim) == ("own", 0, 48)
    report = evaluate(pictures[:16], ImageSet.of(pictures[16:]), own, yardsticks=False)
    assert "fd_own" in report.scores and "is needs classes, and own has none" in report.notes
    assert not any(name.startswith("is_") for name in report.scores)
    again = train_encoder(ImageSet.of(pictures), tmp_path / "again/own.safetensors", steps=4)
    assert again["seed"] == 0
    assert (tmp_path / "own.safetensors").read_bytes()[-400:] == (tmp_path / "again/own.safetensors").read_bytes()[
        -400:
    ]


def test_the_encoders_command_and_what_evaluates_by_it(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_edm_zip(ImageSet.of(shapes(20)), tmp_path / "shapes.zip")
    main(["data", "encoder", str(tmp_path / "shapes.zip"), str(tmp_path / "mine.safetensors"), "--steps", "2"])
    words = ["evaluate", str(tmp_path / "shapes.zip"), "--data", str(tmp_path / "shapes.zip"), "--no-yardsticks"]
    main(
        [*words, "--features", str(tmp_path / "mine.safetensors"), "--metrics", "fd", "--out", str(tmp_path / "s.json")]
    )
    (entry,) = read_json(tmp_path / "s.json")["reports"]
    assert entry["report"]["scores"]["fd_mine"] == pytest.approx(0, abs=1e-6)
    told = refused(*words, "--features", "nothing")
    assert "features is 'nothing'; it must be digits or emoji, an encoder's file" in told
    assert "give one" in refused(*words, "--features", "emoji", "--inception", "x.pth")
    few = ImageSet.of(shapes(4))
    with pytest.raises(UserError, match="has 4 images; an encoder needs at least 8"):
        train_encoder(few, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match=r"must be called NAME\.safetensors"):
        train_encoder(ImageSet.of(shapes(20)), tmp_path / "a b.safetensors")


# --- networks of a folder -------------------------------------------------------------------------------------------


def dinov2(folder: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    torch.manual_seed(0)
    network = transformers.Dinov2Model(config).eval()
    network.save_pretrained(folder, safe_serialization=True)
    return network


def test_dinov2_is_its_class_token(tmp_path: Path) -> None:
    network = dinov2(tmp_path / "dino")
    (tmp_path / "dino/preprocessor_config.json").write_text(
        '{"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'
    )
    extractor = find_extractor(str(tmp_path / "dino"), "any")
    images = noise(3, 28)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = network(pixel_values=x).last_hidden_state[:, 0].numpy()
    features, logits = extractor(images)
    assert np.allclose(features, expected, atol=1e-5) and extractor.dim == 16 and logits.shape == (3, 0)
    assert extractor.name.startswith("dinov2-") and extractor(noise(2, 40, 1))[0].shape == (2, 16)


def test_clip_is_its_projection(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).eval().save_pretrained(tmp_path, safe_serialization=True)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 28}')
    extractor = find_extractor(f"clip:{tmp_path}", "any")
    assert extractor(noise(2, 28))[0].shape == (2, 8) and extractor.name.startswith("clip-")
    maps = perceptual_network(f"clip:{tmp_path}", DataSpec(name="any", resolution=28, channels=3))
    images = torch.zeros(1, 3, 28, 28, requires_grad=True)
    (tokens,) = maps(images)
    assert tokens.shape == (1, 16, 2, 2)
    tokens.square().sum().backward()
    assert images.grad.abs().sum() > 0
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 42}')
    with pytest.raises(UserError, match=r"is of pictures of 28 pixels; its preprocessor_config\.json makes 42"):
        find_extractor(str(tmp_path), "any")
    with pytest.raises(UserError, match="holds a clip network"):
        find_extractor(f"dinov2:{tmp_path}", "any")
    with pytest.raises(UserError, match=r"/none is no folder with the config\.json of a clip network"):
        find_extractor(f"clip:{tmp_path}/none", "any")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(UserError, match="is of a bert; known are dinov2 and clip"):
        find_extractor(str(tmp_path), "any")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"has no model\.safetensors; other kinds of weights"):
        find_extractor(str(tmp_path), "any")
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        find_extractor(str(tmp_path), "any")


def damaged(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a folder's file changed: its JSON, or its tensors."""
    path = folder / name
    if path.suffix == ".json":
        content = read_json(path)
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("model.safetensors", lambda t: t.pop("layernorm.weight"), r"lacks 'layernorm\.weight'"),
        ("model.safetensors", lambda t: t.update({"layernorm.bias": t["layernorm.bias"].int()}), "is torch.int32"),
        ("model.safetensors", lambda t: t["layernorm.bias"].fill_(torch.nan), "not finite in a black picture"),
        ("model.safetensors", lambda t: t.update({"layernorm.bias": torch.zeros(3)}), "is no whole dinov2 network"),
        ("config.json", lambda c: c.update(num_hidden_layers=10**9), "describes 1000000000 layers; its weights are 2"),
        ("config.json", lambda c: c.update(num_hidden_layers="1"), "describes 1 layers; its"),
        ("config.json", lambda c: c.update(num_attention_heads=-1), "is no whole dinov2 network"),
        (
            "preprocessor_config.json",
            lambda c: c.update(image_mean=3),
            "image_mean and image_std three numbers",
        ),
        ("preprocessor_config.json", lambda c: c.update(image_std=[0.5, "1", 0.5]), "three numbers up to 1"),
        ("preprocessor_config.json", lambda c: c.update(image_std=[0.5, 0, 0.5]), "three numbers up to 1"),
        ("preprocessor_config.json", lambda c: c.update(crop_size=10**6), "a size of 14 to 1024"),
    ],
)
def test_what_is_damaged_is_named(name: str, change: Any, sentence: str, tmp_path: Path) -> None:
    dinov2(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 28}')
    damaged(tmp_path, name, change)
    with pytest.raises(UserError, match=sentence) as told:
        find_extractor(f"dinov2:{tmp_path}", "any")
    assert "\n" not in str(told.value)


def test_inceptions_folder_must_hold_one_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold one file of weights"):
        find_extractor(None, "any", str(tmp_path))
