"""MD4's network: shapes, uniform answers at the start, what it is told, what it sees, mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from imagewright.models.description import build, describe
from imagewright.networks import PixelUNet, PixelUNetConfig
from imagewright.networks.pixel_unet import TransformerLayer
from imagewright.types import Condition, UserError

PLAIN = PixelUNetConfig(img_resolution=4, in_channels=3, values=5, label_dim=2, model_channels=8, num_blocks=2)
PATCHES = replace(PLAIN, transformer_depth=2, transformer_width=12, transformer_heads=3)
both = pytest.mark.parametrize("config", [PLAIN, PATCHES], ids=["attention", "transformer"])


def network(config: PixelUNetConfig, *, stirred: bool = True) -> PixelUNet:
    """In eval mode; stirred: also the weights that are zero at the start are drawn."""
    torch.manual_seed(0)
    made = PixelUNet(config).eval()
    if stirred:
        for p in made.parameters():
            nn.init.normal_(p, std=0.1)
    return made


def tokens(n: int = 2) -> torch.Tensor:
    return torch.randint(6, (n, 48), generator=torch.Generator().manual_seed(1))


TIME = torch.tensor([0.3, 0.9])


@both
def test_all_values_are_alike_at_the_start(config: PixelUNetConfig) -> None:
    logits = network(config, stirred=False)(tokens(), TIME)
    assert logits.shape == (2, 48, 5) and not logits.any()


@both
def test_everything_learns(config: PixelUNetConfig) -> None:
    made = network(config)
    made(tokens(), TIME, Condition(label=torch.tensor([0, -1]))).square().sum().backward()
    silent = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert made.classes is not None and made.classes.weight.grad is not None
    assert made.classes.weight.grad.any(1).tolist() == [True, False, True]  # class 0, and none


@both
def test_time_label_and_every_token_are_heard(config: PixelUNetConfig) -> None:
    made, shown = network(config).double(), tokens()[:1]
    base = made(shown, TIME[:1])
    assert not torch.allclose(base, made(shown, TIME[1:]))
    assert not torch.allclose(base, made(shown, TIME[:1], Condition(label=torch.tensor([1]))))
    torch.testing.assert_close(base, made(shown, TIME[:1], Condition(label=torch.tensor([-1]))))
    changed = shown.clone()
    changed[0, 47] = (changed[0, 47] + 1) % 6
    assert (made(changed, TIME[:1]) != base).any(2).all()  # to the other corner, through the middle


def test_logits_stand_where_their_tokens_do() -> None:
    """Without what mixes places, an answer depends on its own pixel alone: row, column, channel."""
    made = network(PLAIN)
    head = made.head
    with torch.no_grad():
        for name, module in made.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight[:, :, 1, 1].clone()
                module.weight.zero_()
                module.weight[:, :, 1, 1] = centre
            if name.endswith("out"):
                module.weight.zero_()  # type: ignore[operator, union-attr]
                module.bias.zero_()  # type: ignore[operator, union-attr]
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert head.weight[:, :, 0].abs().sum() == 0
    shown = tokens()[:1]
    base = made(shown, TIME[:1])
    for place in (0, 4, 17, 47):
        changed = shown.clone()
        changed[0, place] = (changed[0, place] + 1) % 6
        moved = (made(changed, TIME[:1]) != base).any(2)[0].view(16, 3)
        assert moved.any(1).nonzero().flatten().tolist() == [place // 3]
    # Of the head's channels, those of one sub-pixel stand together.
    with torch.no_grad():
        head.bias.copy_(torch.arange(15.0))
        head.weight.zero_()
    torch.testing.assert_close(made(shown, TIME[:1])[0].view(16, 15), torch.arange(15.0).expand(16, 15))


@both
def test_a_description_makes_the_same_network(config: PixelUNetConfig) -> None:
    made = network(config)
    again = build(describe(made))
    again.load_state_dict(made.state_dict())
    assert isinstance(again, PixelUNet) and again.config == config
    torch.testing.assert_close(again.eval()(tokens(), TIME), made(tokens(), TIME))


@both
def test_what_is_zero_at_the_start_is_the_released_ones(config: PixelUNetConfig) -> None:
    """Second convolutions, what the condition adds or scales by, the transformer's last layer, the logits."""
    made = network(config, stirred=False)
    zero = {name for name, p in made.named_parameters() if p.ndim > 1 and not p.any()}
    ends = ("conv1.weight", "shift.weight", "affine.weight", "head.weight")
    expected = {name for name, _ in made.named_parameters() if name.endswith(ends)}
    assert zero == expected | ({"middle.0.out.weight"} if config.transformer_depth else set())
    assert not any(p.any() for name, p in made.named_parameters() if name.endswith("bias"))
    kernel = PixelUNet(PixelUNetConfig(img_resolution=4, in_channels=3, num_blocks=1)).down[0].conv0.weight.detach()
    assert float(kernel.std()) == pytest.approx((1 / (9 * 128)) ** 0.5, rel=0.02)  # lecun's, cut at two deviations
    assert float(kernel.abs().max() / kernel.std()) == pytest.approx(2 / 0.8796, rel=0.01)


@both
def test_every_block_drops_out_before_its_second_convolution(
    config: PixelUNetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = network(replace(config, dropout=0.3)).up[0].train()
    seen: list[float] = []
    monkeypatch.setattr(
        "imagewright.networks.pixel_unet.dropout",
        lambda x, p, training: seen.append(p) or x * 0,  # type: ignore[func-returns-value]
    )
    x = torch.randn(2, 16, 4, 4)
    bias, skip = block.conv1.bias, block.skip(x)
    torch.testing.assert_close(block(x, torch.randn(2, 8)), skip + bias[:, None, None])
    assert seen == [0.3]


def test_dropout_of_the_transformer_acts_on_weights_channels_and_hidden_units() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(12, 3, 8, 0.5)
    with torch.no_grad():
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
    h = torch.randn(2, 5, 12)
    whole = layer.eval()._attention(h)
    torch.manual_seed(1)
    dropped = layer.train()._attention(h)
    silent = (dropped == 0).all(1)  # whole channels of an image, at all places alike
    assert torch.equal(silent[:, None].expand_as(dropped), dropped == 0) and 0 < int(silent.sum()) < 24
    assert not torch.allclose((dropped / 2)[dropped != 0], whole[dropped != 0])  # the attention's weights too


def test_the_middle_transformer_answers_nothing_at_the_start() -> None:
    made = network(PATCHES, stirred=False)
    assert not made.middle[0](torch.randn(1, 8, 4, 4), torch.randn(1, 8)).any()
    assert float(made.tokens.weight.detach().std()) == pytest.approx(8**-0.5, rel=0.3)


def test_mistakes_are_named() -> None:
    made = network(PLAIN)
    with pytest.raises(UserError, match=r"tokens are \[2, 47\]; this network takes \[N, 48\]"):
        made(tokens()[:, 1:], TIME)
    with pytest.raises(UserError, match="this network is told the time"):
        made(tokens())
    with pytest.raises(UserError, match="label 2 is no class; they are 0 to 1, or -1"):
        made(tokens(), TIME, Condition(label=torch.tensor([0, 2])))
    with pytest.raises(UserError, match="patch is 3; it must be a divisor of img_resolution, 4"):
        replace(PATCHES, patch=3)
    with pytest.raises(UserError, match="transformer_heads is 5; it must be a divisor of transformer_width, 12"):
        replace(PATCHES, transformer_heads=5)
    with pytest.raises(UserError, match="transformer_width is 6; it must be divisible by 4"):
        replace(PATCHES, transformer_width=6)
    with pytest.raises(UserError, match="num_blocks is 0"):
        replace(PLAIN, num_blocks=0)
    with pytest.raises(UserError, match="model_channels is 9; it must be even"):
        replace(PLAIN, model_channels=9)
