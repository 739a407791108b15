"""The table of kinds of model, held against the page that shows it and against what the commands do."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.models.causal import CausalTokenModel
from imagewright.models.classifier import Classifier
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, save_model
from imagewright.models.kinds import KINDS, Command
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.tokens import PixelCodec
from imagewright.networks import (
    SongUNet,
    SongUNetConfig,
    TokenTransformer,
    TokenTransformerConfig,
    WideResNet,
    WideResNetConfig,
)
from imagewright.types import DataSpec, ModelKind, kind_of

SPEC = DataSpec(name="digits", resolution=8, channels=1)
COMMANDS = get_args(Command)
PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()


def unet() -> nn.Module:
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                            num_blocks=1, attn_resolutions=())  # fmt: skip
    return SongUNet(config)


def token_model() -> nn.Module:
    codec = PixelCodec(8, 1)
    config = TokenTransformerConfig(values=codec.values, length=codec.length, width=8, depth=1, heads=1, causal=True)
    return CausalTokenModel(TokenTransformer(config), codec)


MADE = {
    "denoiser": lambda: EDMPrecond(unet()),
    "flow_map": lambda: ConsistencyModel(unet()),
    "token_model": token_model,
    "codec": lambda: PixelCodec(8, 1),
    "encoder": lambda: Classifier(WideResNet(WideResNetConfig(img_resolution=8, in_channels=1, blocks=1, widen=1))),
}


def test_every_kind_is_in_the_table_and_the_table_on_the_page() -> None:
    assert set(KINDS) == set(get_args(ModelKind))
    for name, kind in KINDS.items():
        agrees = ", ".join(("resolution", "channels", "classes")[: len(kind.agreement(SPEC))]) or "nothing"
        does = " | ".join(kind.does.get(command, "-") for command in COMMANDS)
        assert f"| {name} | `{kind.protocol.__name__}` | {agrees} | {does} |" in PAGE


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("command", ["sample", "couple"])
def test_commands_do_what_the_table_says(
    kind: ModelKind, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = MADE[kind]()
    assert kind_of(model) == kind
    save_model(tmp_path / "model", ModelFile(model=model, spec=SPEC))
    args = [command, str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--n", "1", "--device", "cpu"]
    if command in KINDS[kind].does:
        main([*args, *(["--steps", "1"] if kind == "denoiser" else [])])
        return
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert "draws" in capsys.readouterr().err


class Doubler(nn.Module):
    """Latents that are the images, twice."""

    kind = "autoencoder"
    latent = (1, 8, 8)

    def encode(self, images: Tensor, noise: object = None) -> Tensor:
        return 2 * images

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 2


def test_what_only_answers_is_not_sampled() -> None:
    from imagewright.samplers.generator import ImageGenerator

    with pytest.raises(Exception, match="a Doubler draws no images; it turns images into latents and back"):
        ImageGenerator(Doubler(), SPEC)
