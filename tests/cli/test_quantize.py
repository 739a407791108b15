"""`tune quantize` on every kind of model, and that what it writes is a model as any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imagewright.cli.main import main
from imagewright.files import read_json
from imagewright.models.classifier import Classifier
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.image_text import ImageText
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.tokens import PixelCodec
from imagewright.networks import (
    CLIP,
    CLIPConfig,
    ConvClassifier,
    ConvClassifierConfig,
    SongUNet,
    SongUNetConfig,
    WideResNet,
    integers,
)
from imagewright.networks.quantized import is_quantized
from imagewright.networks.token_transformer import TokenTransformer, TokenTransformerConfig
from imagewright.networks.wide_resnet import WideResNetConfig
from imagewright.tuning import quantization
from imagewright.tuning.synthesis import Synthesis
from imagewright.types import DataSpec

SPEC = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
CLIP_SIZES = {"img_resolution": 8, "in_channels": 1, "patch": 4, "width": 8, "depth": 1, "head_width": 8, "embed": 8}
CLIP_SIZES |= {"vocabulary": 8, "length": 4, "text_width": 8, "text_depth": 1, "text_heads": 1}
SMALL = ["--images", 8, "--seed", 3, "--device", "cpu"]


def call(*words: object) -> None:
    main([str(w) for w in words])


def unet(**told: Any) -> nn.Module:
    sizes = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10, "channel_mult": (1,)}
    return SongUNet(SongUNetConfig(**sizes, model_channels=8, num_blocks=1, attn_resolutions=(), **told))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained ones, a folder each."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    digits = {"img_resolution": 8, "in_channels": 1, "num_classes": 10}
    tokens = TokenTransformerConfig(values=2, length=64, label_dim=10, width=16, depth=1, heads=2)
    made: dict[str, nn.Module] = {
        "denoiser": EDMPrecond(unet()),
        "map": ConsistencyModel(unet()),
        "tokens": MaskedTokenModel(TokenTransformer(tokens), PixelCodec(8, 1, 2)),
        "wide": Classifier(WideResNet(WideResNetConfig(**digits, blocks=1, widen=1))),  # type: ignore[arg-type]
        "plain": Classifier(ConvClassifier(ConvClassifierConfig(**digits, widths=(8, 8)))),  # type: ignore[arg-type]
        "codec": PixelCodec(8, 1, 2),
        "texts": ImageText(CLIP(CLIPConfig(**CLIP_SIZES))),
    }
    for name, model in made.items():
        save_model(folder / name, ModelFile(model=model, spec=SPEC))
    return folder


@pytest.mark.parametrize(
    ("name", "buckets", "told"),
    [
        ("denoiser", 2, ["--bits", 4, "--steps", 3, "--buckets", 2, "--updates", 2, "--rate", 1e-4]),
        ("denoiser", 1, ["--bits", 3, "--activations", 0, "--norms", "none", "--steps", 1]),
        ("map", 1, ["--bits", 2, "--ranges", "noise"]),
        ("tokens", 2, ["--bits", 8, "--steps", 2]),
    ],
    ids=["denoiser", "weights alone", "map", "tokens"],
)
def test_generators_draw_as_before_and_say_what_they_are(
    name: str, buckets: int, told: list[object], models: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    call("tune", "quantize", models / name, "--out", tmp_path / "few", *told, *SMALL)
    record = read_json(tmp_path / "few/model.json")
    bits = record["model"]["network"]["quantized"]
    assert (bits["bits"], bits["buckets"]) == (told[1], buckets)
    assert record["origin"]["quantization"]["seed"] == 3
    assert is_quantized(load_model(tmp_path / "few").model)
    few = [] if name == "map" else ["--steps", 1]
    call("sample", tmp_path / "few", "--n", 2, *few, "--out", tmp_path / "s", "--device", "cpu")
    drawn = ["--n", 2, *few, "--precision", "int8", "--out", tmp_path / "w", "--device", "cpu"]
    if integers._exact() and "--activations" not in told:
        call("sample", tmp_path / "few", *drawn)
        assert read_json(tmp_path / "w/samples.json")["precision"] == "int8"
    assert "its weights are floats" in refused("sample", models / name, *drawn)
    assert (tmp_path / "few/model.safetensors").stat().st_size < (models / name / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "told",
    [["--bits", 8], ["--ranges", "noise", "--norms", "reestimate"], ["--ranges", "matched", "--updates", 1]],
    ids=["responding", "noise", "matched"],
)
@pytest.mark.parametrize("name", ["wide", "plain"])
def test_encoders_are_calibrated_without_data_and_evaluated(
    name: str, told: list[object], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagewright.cli.tune_quantize.Synthesis", partial(Synthesis, iterations=2))
    given, real = [], quantization.quantize

    def watched(network: Any, ranges: Any, config: Any, *, norms: Any, loss: Any) -> None:
        given.append((ranges[0][0], norms[0][0]))
        real(network, ranges, config, norms=norms, loss=loss)

    monkeypatch.setattr(quantization, "quantize", watched)
    call("tune", "quantize", models / name, "--out", tmp_path / "few", *told, *SMALL)
    ((clipping, mending),) = given  # norms take statistics of matched pictures, whatever sets the ranges
    assert torch.equal(clipping, mending) == ("--ranges" in told)
    call("evaluate", tmp_path / "few", "--n", 16, "--device", "cpu")
    found = read_json(tmp_path / "few/model.json")["origin"]["quantization"]
    assert (found["aim"] is not None) == (found["ranges"] == "responding")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["codec"], "codec is a model of kind codec, which turns images into tokens and back; quantize encoders and"),
        (["wide", "--buckets", 4], "--buckets has no effect on an encoder"),
        (["wide", "--steps", 4], "--steps has no effect on an encoder"),
        (["wide", "--ranges", "own"], "--ranges is own; of a model of kind encoder it is responding or matched or"),
        (["denoiser", "--ranges", "matched"], "--ranges is matched; of a model of kind denoiser it is own or noise"),
        (["denoiser", "--norms", "reestimate"], "a SongUNet has no batch norm to re-estimate"),
        (["denoiser", "--bits", 9], "--bits is 9; it must be a whole number from 2 to 8"),
        (["denoiser", "--activations", 1], "--activations is 1; it must be 0, or 2 to 8"),
        (["denoiser", "--activations", 0, "--buckets", 2], "--buckets has no effect with --activations 0"),
        (["denoiser", "--activations", 0, "--norms", "none", "--ranges", "own"], "--ranges own has no effect where"),
        (["denoiser", "--rate", 0.1], "--rate has no effect without --updates"),
        (["texts"], "texts is an ImageText, of pictures and texts; quantize classifiers"),
        (["tokens", "--ranges", "noise"], "a network of tokens is shown no noise; give --ranges own"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    words: list[object], sentence: str, models: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    few = ["--steps", 1] if "--steps" not in words and words[0] in ("denoiser", "tokens") else []
    assert sentence in refused(
        "tune", "quantize", models / str(words[0]), *words[1:], *few, "--out", tmp_path / "few", "--images", 2
    )
    assert not (tmp_path / "few").exists()


def test_a_quantized_model_is_no_teacher_and_is_quantized_once(
    models: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    call("tune", "quantize", models / "denoiser", "--out", tmp_path / "few", "--steps", 1, "--bits", 4, *SMALL)
    again = refused("tune", "quantize", tmp_path / "few", "--out", tmp_path / "again", "--steps", 1, *SMALL)
    assert "the model is quantized; quantize the one that it was made of" in again
    taught = refused("train", "cd-digits", "--teacher", tmp_path / "few", "--out", tmp_path / "run")
    assert "is quantized, so its weights cannot be trained; give what it was made of" in taught
    told = refused("export", tmp_path / "few", "--out", tmp_path / "few.onnx", "--format", "onnx")
    assert "is quantized, which --format onnx has no place for; export what it was made of" in told
    call("export", tmp_path / "few", "--out", tmp_path / "copy", "--half")
    assert load_model(tmp_path / "copy").weights_sha256 == load_model(tmp_path / "few").weights_sha256
