"""Layer skipping: bit-identity without skips, identity where all is skipped, what stays, and the table of levels."""

import pytest
import torch

from imagewright.guidance import Guided
from imagewright.guidance.layer_skipping import LayerSkipped, layers_of, without_layers
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.oracles import GaussianOracle
from imagewright.recipes import RECIPES
from imagewright.types import Condition, Denoiser, UserError

SIZES = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 4}
COND = Condition(label=torch.tensor([0, 3]))
SIGMA = torch.tensor([0.3, 5.0], dtype=torch.float64)


def networks():
    torch.manual_seed(0)
    song = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
    adm = {"model_channels": 64, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}
    found = {
        "DDPM++": SongUNet(SongUNetConfig(**SIZES, **song)),
        "NCSN++": SongUNet(SongUNetConfig(**SIZES, **song, encoder_type="residual", embedding_type="fourier")),
        "ADM": DhariwalUNet(DhariwalUNetConfig(**SIZES, **adm)),
    }
    for network in found.values():
        for parameter in network.parameters():  # away from the zeros of the initialisation
            torch.nn.init.normal_(parameter, std=0.1)
        network.double().eval()
    return found


NETWORKS = networks()
EVERY = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def x(seed=1):
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_layers_are_numbered_as_they_run():
    kinds = [(layer.block, layer.kind) for layer in layers_of(NETWORKS["DDPM++"])]
    assert [layer.id for layer in layers_of(NETWORKS["DDPM++"])] == list(range(len(kinds)))
    assert kinds[:4] == [
        ("enc.8x8_block0", "residual"),
        ("enc.4x4_down", "residual"),
        ("enc.4x4_block0", "residual"),
        ("enc.4x4_block0", "attention"),
    ]
    assert kinds[-1] == ("dec.8x8_block1", "residual")


def test_the_published_network_has_the_published_number_of_layers():
    """58, so that the paper's N_max = 580 is ten steps of the ImageNet-64 ADM: 36 residual layers and 22 attentions."""
    with torch.device("meta"):
        layers = layers_of(DhariwalUNet(RECIPES["edm-imagenet64"]().network))
    assert len(layers) == 58 and sum(layer.kind == "attention" for layer in layers) == 22
    assert [layer.kind for layer in layers if "in" in layer.block.split(".")[1]] == [
        "residual",
        "attention",
        "residual",
    ]


@EVERY
def test_without_skips_it_is_the_plain_network_bit_for_bit(network):
    plain = EDMPrecond(network)
    skipped = LayerSkipped(plain, {1.0: ()})
    assert isinstance(skipped, Denoiser)
    assert torch.equal(skipped(x(), SIGMA, COND), plain(x(), SIGMA, COND))
    assert torch.equal(without_layers(network, ())(x(), SIGMA, COND), network(x(), SIGMA, COND))


@EVERY
def test_every_layer_counts_and_the_network_stays_as_it_was(network):
    before = network(x(), SIGMA, COND)
    names = [name for name, _ in network.named_modules()]
    for layer in layers_of(network):
        assert not torch.allclose(without_layers(network, [layer.id])(x(), SIGMA, COND), before), layer
    assert torch.equal(network(x(), SIGMA, COND), before)
    assert [name for name, _ in network.named_modules()] == names


@EVERY
def test_skipped_layers_are_not_computed(network):
    ran = []
    layers = layers_of(network)
    chosen = [layer for layer in layers if layer.id % 2]
    watched = {"residual": "conv1", "attention": "proj"}
    hooks = [
        getattr(network.blocks()[layer.block], watched[layer.kind]).register_forward_hook(
            lambda *_, i=layer.id: ran.append(i)
        )
        for layer in layers
    ]
    model = LayerSkipped(EDMPrecond(network), {1.0: [layer.id for layer in chosen]})
    model(x(), SIGMA, COND)
    for hook in hooks:
        hook.remove()
    assert ran == [layer.id for layer in layers if not layer.id % 2]
    assert model.executed(1.0) == len(ran)


@EVERY
def test_blocks_whose_shortcut_is_the_identity_return_their_input(network):
    """All layers skipped: every block is its shortcut, and where that is the identity, its input."""
    bare = without_layers(network, range(len(layers_of(network))))
    emb = network.embed(SIGMA, COND)
    kept = 0
    for name, block in network.blocks().items():
        stage, key = name.split(".")
        h = torch.randn(2, block.norm0.num_channels, 8, 8, dtype=torch.float64)
        left = getattr(bare, stage)[key](h, emb)
        assert torch.equal(left, h if block.skip is None else block.skip(h))
        kept += block.skip is None
    assert kept


def test_skipping_every_layer_of_an_adm_returns_its_input_path():
    """From the stem to the last block nothing but shortcuts: the plain chain of convolutions and resamplings."""
    network = NETWORKS["ADM"]
    h, skips = network.enc["8x8_conv"](x()), []
    skips.append(h)
    for block in (network.enc[k] for k in ("8x8_block0", "4x4_down", "4x4_block0")):
        h = block.skip(h) if block.skip is not None else h
        skips.append(h)
    for key, block in network.dec.items():
        h = h if key in ("4x4_in0", "4x4_in1", "8x8_up") else torch.cat([h, skips.pop()], 1)
        h = block.skip(h) if block.skip is not None else h
    want = network.out_conv(torch.nn.functional.silu(network.out_norm(h)))
    bare = without_layers(network, range(len(layers_of(network))))
    torch.testing.assert_close(bare(x(), SIGMA, COND), want)


def test_each_noise_level_has_its_own_skips():
    plain = EDMPrecond(NETWORKS["DDPM++"])
    table = {0.2: (), 4.0: (2, 5), 60.0: (1,)}
    mixed = LayerSkipped(plain, table)(x(), SIGMA, COND)
    torch.testing.assert_close(mixed[:1], plain(x()[:1], SIGMA[:1], COND[:1]))
    second = COND[torch.tensor([1])]
    torch.testing.assert_close(mixed[1:], LayerSkipped(plain, {1.0: (2, 5)})(x()[1:], SIGMA[1:], second))
    # The nearest in ln sigma: 20 is nearer to 60 than to 4.
    torch.testing.assert_close(
        LayerSkipped(plain, table)(x(), torch.tensor(20.0), COND),
        LayerSkipped(plain, {1.0: (1,)})(x(), SIGMA[:0].new_tensor(20.0), COND),
    )


def test_follows_mode_and_composes():
    plain = EDMPrecond(NETWORKS["DDPM++"])
    skipped = LayerSkipped(plain, {1.0: (2,)})
    assert len(list(skipped.parameters())) == len(list(plain.parameters()))
    want = 2 * plain(x(), SIGMA, COND) - skipped(x(), SIGMA, COND)
    torch.testing.assert_close(Guided(plain, skipped, 2.0)(x(), SIGMA, COND), want)
    assert skipped.train().denoiser.network.training and not skipped.eval().denoiser.network.training


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda plain: LayerSkipped(plain, {1.0: (99,)}), "skipped layer 99 does not exist; this network has layers 0"),
        (lambda plain: LayerSkipped(plain, {1.0: (-1,)}), "skipped layer -1 does not exist"),
        (lambda plain: LayerSkipped(plain, {}), "must be one or more, positive and finite"),
        (lambda plain: LayerSkipped(plain, {0.0: ()}), r"has the noise levels \[0\.0\]"),
        (
            lambda plain: LayerSkipped(GaussianOracle(torch.zeros(1), std=1.0), {1.0: ()}),
            "needs a denoiser made of a U",
        ),
    ],
)
def test_bad_settings_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make(EDMPrecond(NETWORKS["DDPM++"]))
