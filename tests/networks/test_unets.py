"""SongUNet and DhariwalUNet: shapes, conditioning, attention, derivatives, configuration."""

import json
import math

import pytest
import torch

from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig, UNet
from imagewright.networks.block import attention
from imagewright.types import UNCONDITIONAL, Condition, UserError

BOTH = pytest.mark.parametrize("network", [SongUNet, DhariwalUNet])
NCSNPP = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
}


def tiny(network: type[UNet], **changes) -> UNet:
    """A small float64 network with no layer left near zero, so that everything has an influence."""
    arguments = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    net = network(network.config_class(**(arguments | changes))).double().eval()
    for p in net.parameters():
        p.data += torch.randn_like(p) * (0.1 if p.ndim == 1 else 1 / math.sqrt(p[0].numel()))
    return net


def inputs(n: int = 2, channels: int = 3, resolution: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, resolution, resolution, generator=generator, dtype=torch.float64)
    return x, torch.linspace(-1, 1, n, dtype=torch.float64)


# --- shapes and names ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("resolution", "mult"), [(8, (1, 2)), (12, (2, 1, 1)), (28, (1, 1)), (6, (1,))])
def test_any_channels_and_resolution(network, channels, resolution, mult):
    net = tiny(network, img_resolution=resolution, in_channels=channels, out_channels=channels + 1, channel_mult=mult)
    x, t = inputs(2, channels, resolution)
    assert net(x, t).shape == (2, channels + 1, resolution, resolution)


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_every_song_variant_uses_all_its_parameters(encoder, decoder, taps):
    net = tiny(SongUNet, encoder_type=encoder, decoder_type=decoder, resample_filter=taps, channel_mult=(1, 2, 1))
    x, t = inputs()
    (net(x, t) * torch.randn_like(x)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_keys_are_the_published_ones():
    song = set(tiny(SongUNet, **NCSNPP, decoder_type="skip", label_dim=4, augment_dim=9).state_dict())
    assert {
        "map_noise.freqs",
        "map_label.bias",
        "map_augment.weight",
        "map_layer1.weight",
        "enc.8x8_conv.weight",
        "enc.8x8_block0.affine.bias",
        "enc.4x4_down.skip.weight",
        "enc.4x4_aux_residual.weight",
        "enc.4x4_block0.qkv.weight",
        "dec.4x4_in0.proj.bias",
        "dec.4x4_aux_norm.weight",
        "dec.8x8_up.conv0.weight",
        "dec.8x8_aux_conv.bias",
    } <= song
    assert "map_augment.bias" not in song
    adm = set(tiny(DhariwalUNet, label_dim=4).state_dict())
    assert {"map_label.weight", "dec.4x4_in0.qkv.weight", "out_norm.weight", "out_conv.bias"} <= adm
    assert not {"map_label.bias", "enc.4x4_down.skip.weight"} & adm
    assert not [key for key in song | adm if "resample" in key]


def test_fewer_channels_than_a_head_means_no_attention_in_adm():
    assert not [key for key in tiny(DhariwalUNet, channel_mult=(1, 1)).state_dict() if "qkv" in key]


@BOTH
def test_stages_compose_to_the_network(network):
    net = tiny(network)
    x, t = inputs()
    emb = net.embed(t, UNCONDITIONAL)
    hidden, skips = net.encode(x, emb)
    assert hidden.shape == (2, 64, 4, 4)
    assert [s.shape[1] for s in skips] == [32, 32, 32, 64]
    assert torch.equal(net.decode(hidden, skips, emb), net(x, t))
    assert len(skips) == 4


def test_initial_outputs_are_nearly_zero():
    x, t = inputs()
    config = {
        "img_resolution": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "channel_mult": (1, 2),
    }
    with torch.no_grad():
        assert SongUNet(SongUNetConfig(**config))(x.float(), t.float()).abs().max() < 1e-3
        assert DhariwalUNet(DhariwalUNetConfig(**config))(x.float(), t.float()).abs().max() == 0


# --- conditioning -------------------------------------------------------------------------------------------


@BOTH
def test_label_minus_one_is_no_label_and_rows_are_independent(network):
    net = tiny(network, label_dim=4)
    x, t = inputs(3)
    mixed = net(x, t, Condition(label=torch.tensor([2, -1, 0])))
    without = net(x, t)
    torch.testing.assert_close(mixed[1], without[1])
    assert (mixed[[0, 2]] - without[[0, 2]]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(mixed[2:], net(x[2:], t[2:], Condition(label=torch.tensor([0]))))


@BOTH
def test_labels_are_ignored_without_classes(network):
    net = tiny(network)
    x, t = inputs()
    assert torch.equal(net(x, t, Condition(label=torch.tensor([5, 1]))), net(x, t))


@BOTH
def test_no_augmentation_equals_zeros(network):
    net = tiny(network, augment_dim=5)
    x, t = inputs()
    zeros = net(x, t, Condition(augment=torch.zeros(2, 5)))
    torch.testing.assert_close(zeros, net(x, t))
    assert (net(x, t, Condition(augment=torch.ones(2, 5))) - zeros).abs().max() > 1e-3


@BOTH
def test_dropout_acts_in_training_only(network):
    net = tiny(network, dropout=0.5)
    x, t = inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@BOTH
def test_label_dropout_hides_the_class_in_training_only(network):
    net = tiny(network, label_dim=4, label_dropout=1.0)
    x, t = inputs()
    cond = Condition(label=torch.tensor([1, 3]))
    conditional, unconditional = net(x, t, cond), net(x, t)
    assert (conditional - unconditional).abs().max() > 1e-3
    net.train()
    torch.testing.assert_close(net(x, t, cond), unconditional)


def test_label_dropout_keeps_its_rate():
    net = tiny(SongUNet, label_dim=2, label_dropout=0.25).train()
    rows = net._label_rows(Condition(label=torch.ones(4000, dtype=torch.int64)), torch.zeros(()))
    assert rows[:, 1].mean().item() == pytest.approx(0.75, abs=0.03)
    assert not rows[:, 0].any()


# --- attention and derivatives ------------------------------------------------------------------------------


def test_attention_is_softmax_attention():
    q, k, v = torch.randn(3, 2, 2, 10, 6, dtype=torch.float64)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), weights @ v)


def test_heads_own_runs_of_channels_in_which_q_k_v_alternate():
    net = tiny(DhariwalUNet, model_channels=64, channel_mult=(1, 2))
    block = net.dec["4x4_in0"]
    assert block.num_heads == 2
    x = torch.randn(1, 128, 4, 4, dtype=torch.float64)
    flat = block.qkv(block.norm2(x)).flatten(2)[0]  # [384, 16]
    attended = []
    for head in flat.chunk(2):
        q, k, v = head[0::3], head[1::3], head[2::3]  # each [64, 16]
        attended.append(v @ (q.T @ k / 8).softmax(dim=1).T)
    want = block.proj(torch.cat(attended).reshape(1, 128, 4, 4))
    torch.testing.assert_close(block._attend(x), want)


@pytest.mark.parametrize(("network", "changes"), [(SongUNet, {}), (SongUNet, NCSNPP), (DhariwalUNet, {})])
def test_forward_mode_derivative_matches_finite_differences(network, changes):
    net = tiny(network, **changes)
    x, t = inputs()
    dx, dt = torch.randn_like(x), torch.randn_like(t)
    _, tangent = torch.func.jvp(lambda x, t: net(x, t), (x, t), (dx, dt))
    h = 1e-6
    with torch.no_grad():
        want = (net(x + h * dx, t + h * dt) - net(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(tangent, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


@BOTH
def test_memory_layout_does_not_matter(network):
    net = tiny(network, attn_resolutions=(8, 4))
    x, t = inputs()
    want = net(x, t)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), t), want)


@BOTH
def test_inputs_are_left_alone(network):
    net = tiny(network)
    x, t = inputs()
    before = x.clone(), t.clone()
    net(x, t)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


# --- configuration ------------------------------------------------------------------------------------------


def test_every_configuration_survives_json():
    config = SongUNetConfig(img_resolution=16, in_channels=1, out_channels=2, **NCSNPP, channel_mult=[1, 3])
    assert config.channel_mult == (1, 3)
    assert SongUNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    adm = DhariwalUNetConfig(img_resolution=64, in_channels=3, out_channels=3, label_dim=1000)
    assert DhariwalUNetConfig.from_json(json.loads(json.dumps(adm.to_json()))) == adm
    assert adm.model_channels == 192


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"img_resolution": 18, "channel_mult": [1, 1, 1]},
            "img_resolution is 18; it must be divisible by 4",
        ),
        ({"channel_mult": []}, "channel_mult is"),
        ({"channel_mult": 2}, "channel_mult is 2; it must be a list"),
        ({"num_blocks": 0}, "num_blocks is 0; it must be a positive integer"),
        ({"model_channels": 7}, "model_channels is 7; it must be an even integer"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"label_dropout": -0.1}, r"label_dropout is -0.1; it must be in \[0, 1\]"),
        ({"label_dim": -1}, "label_dim is -1"),
        ({"embedding_type": "sine"}, "embedding_type is 'sine'; it must be one of positional, fourier"),
        ({"encoder_type": "skips"}, "encoder_type is 'skips'"),
        ({"decoder_type": "residual"}, "decoder_type is 'residual'; it must be one of standard, skip"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter is \[1, 2, 1\]; it must be an even number"),
        ({"channel_multt": [1]}, "no argument 'channel_multt'; did you mean 'channel_mult'"),
    ],
)
def test_nonsense_is_refused_by_name(changes, sentence):
    good = {"img_resolution": 16, "in_channels": 3, "out_channels": 3}
    with pytest.raises(UserError, match=sentence):
        SongUNetConfig.from_json(good | changes)


def test_missing_arguments_are_named():
    with pytest.raises(UserError, match="DhariwalUNetConfig needs in_channels, out_channels"):
        DhariwalUNetConfig.from_json({"img_resolution": 16})


def test_heads_that_cannot_share_channels_are_refused():
    with pytest.raises(UserError, match="200 channels, which its 3 heads cannot share"):
        tiny(DhariwalUNet, model_channels=200, channel_mult=(1, 1), attn_resolutions=(8,))
