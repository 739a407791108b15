"""Published recipes of EDM and the consistency family, number by number against the official configurations.

EDM: the README's table of options and train.py. Consistency models: launch.sh and configs/ of the CIFAR-10 program,
scripts/launch.sh of the other. iCT has no official program; its two-step levels are the paper's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from imagewright.cli.dry_run import StandIns
from imagewright.methods.distances import Distance
from imagewright.networks.config import UNetConfig
from imagewright.recipes import RECIPES, consistency, consistency_trajectory
from imagewright.recipes.published import eps_of_mean
from imagewright.training.experiment import Experiment, assemble

CONSISTENCY = ("cd", "ct", "ctcd", "ctct", "pd", "ict")
OFFICIAL = [n for n in RECIPES if n.split("-")[0] in CONSISTENCY and ("cifar10" in n or "imagenet64" in n)]


def network_of(name: str, part: str | None = None) -> nn.Module:
    experiment = RECIPES[name]()
    with torch.device("meta"):
        roles = assemble(experiment, sources=StandIns()).parts.roles
    network: nn.Module = roles[part or experiment.method.product].module.network
    return network


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("edm-cifar10", 55_735_299),
        ("edm-cifar10-uncond", 55_733_891),
        ("edm-cifar10-ncsnpp", 56_400_643),
        ("edm-cifar10-uncond-ncsnpp", 56_397_827),
        ("edm-imagenet64", 295_899_267),
        # The other program counts its 128 Fourier frequencies, which do not learn, among the 56,395,651 parameters.
        ("cd-cifar10-teacher", 56_395_651 - 128),
        ("cd-cifar10", 56_395_651 - 128),
        ("ct-cifar10", 56_395_651 - 128),
        ("ctct-cifar10", 56_395_651 - 128),
        ("pd-cifar10", 56_395_651 - 128),
        ("ict-cifar10", 56_395_651 - 128),
        ("cd-imagenet64", 295_899_267),
        ("ct-imagenet64", 295_899_267),
    ],
)
def test_networks_have_the_official_number_of_parameters(name: str, count: int) -> None:
    assert sum(p.numel() for p in network_of(name).parameters()) == count


@pytest.mark.parametrize("name", OFFICIAL)
def test_images_are_mirrored_where_openais_are(name: str) -> None:
    assert RECIPES[name]().data.xflip


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("edm-")])
def test_edms_own_are_mirrored_by_the_augmentation_alone(name: str) -> None:
    assert not getattr(RECIPES[name]().data, "xflip", False)


NO_DROPOUT = ("cd-cifar10", "cd-imagenet64", "ct-cifar10", "ct-imagenet64", "pd-cifar10", "mcd-imagenet64")
DROPOUT = {
    **dict.fromkeys(NO_DROPOUT, 0.0),
    **dict.fromkeys(("ctcd-cifar10", "ctcd-cifar10-stop-gradient", "ctct-cifar10", "ict-cifar10"), 0.3),
    "cd-cifar10-teacher": 0.13, "edm-cifar10": 0.13, "edm-imagenet64": 0.10, "ict-imagenet64": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "dropout"), DROPOUT.items())
def test_dropout(name: str, dropout: float) -> None:
    network: Any = network_of(name)
    assert network.config.dropout == dropout and network.config.label_dropout == 0


RATES = {  # optimiser, rate, images of warm-up, steps, batch
    "edm-cifar10": ("adam", 1e-3, 10_000_000, 390_625, 512),
    "cd-cifar10-teacher": ("adam", 1e-3, 10_000_000, 400_000, 512),
    "cd-cifar10": ("radam", 4e-4, 0, 800_000, 512),
    "ct-cifar10": ("radam", 4e-4, 0, 800_000, 512),
    "ctcd-cifar10": ("radam", 1e-3, 0, 800_000, 512),
    "ctcd-cifar10-stop-gradient": ("radam", 5e-6, 0, 800_000, 512),
    "ctct-cifar10": ("radam", 5e-6, 0, 800_000, 512),
    "pd-cifar10": ("adam", 5e-5, 0, 750_000, 512),
    "cd-imagenet64": ("radam", 8e-6, 0, 600_000, 2048),
    "ct-imagenet64": ("radam", 1e-4, 0, 800_000, 2048),
    "ict-cifar10": ("radam", 1e-4, 0, 400_000, 1024),
    "ict-imagenet64": ("radam", 1e-4, 0, 800_000, 4096),
    "ict-deep-cifar10": ("radam", 1e-4, 0, 400_000, 1024),
}


@pytest.mark.parametrize(("name", "want"), RATES.items())
def test_rates_and_lengths(name: str, want: tuple[str, float, int, int, int]) -> None:
    training = RECIPES[name]().training
    o = training.optimizer
    assert (o.kind, o.lr, o.lr_ramp_images, training.total_images / training.batch, training.batch) == want
    assert o.lr_decay_images is None and o.weight_decay == 0
    assert o.clip_norm == (1.0 if name == "pd-cifar10" else None)


@pytest.mark.parametrize(
    ("name", "decay"),
    [("cd-cifar10", 0.9999), ("ctct-cifar10", 0.9999), ("cd-imagenet64", 0.9999432189950708), ("ict-cifar10", 0.99993)],
)
def test_averages_keep_the_published_share_at_every_step(name: str, decay: float) -> None:
    training = RECIPES[name]().training
    assert 0.5 ** (training.batch / training.ema.halflife_images) == pytest.approx(decay, abs=1e-12)
    assert training.ema.rampup_ratio is None


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("edm-cifar10", 1e-8 / 3072),  # the official loss is a sum over the image
        ("cd-cifar10-teacher", 1e-8 / 3072),
        ("edm-digits", 1e-8 / 64),
        ("edm-emoji64-16", 1e-8 / 768),
        ("edm-emoji64-32", 1e-8 / 3072),
        ("edm-imagenet64", 1e-8 / 12288 / 100),  # and here its constant loss scale stays in the gradient
        ("cd-cifar10", 1e-8),  # official losses are means
        ("ct-imagenet64", 1e-8),
        ("pd-cifar10", 1e-8),
        ("ctcd-cifar10", 1e-8),  # the root of a sum, as officially
        ("ctcd-cifar10-stop-gradient", 2e-8 / 3072),  # officially the sum of g f, here the mean of 2 g f
        ("ctct-cifar10", 2e-8 / 3072),
    ],
)
def test_eps_makes_the_official_step(name: str, eps: float) -> None:
    assert RECIPES[name]().training.optimizer.eps == pytest.approx(eps, rel=1e-12)


def test_adam_on_a_mean_with_that_eps_steps_as_on_the_sum() -> None:
    """Where gradients are near eps, as here, 1e-8 itself would be another optimiser."""
    data = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def trained(total: bool, eps: float) -> torch.Tensor:
        w = torch.full((3, 8, 8), 0.5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=1e-3, eps=eps)
        for k in range(5):
            error = 1e-7 * ((w - data[k % 4]) * data[0]).square()
            optimizer.zero_grad()
            (error.sum() if total else error.mean()).backward()
            optimizer.step()
        return w.detach()

    official = trained(True, 1e-8)
    torch.testing.assert_close(trained(False, eps_of_mean(192)), official, rtol=1e-12, atol=0)
    assert float((trained(False, 1e-8) - official).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("ict-cifar10", (0.821,)),
        ("ict-imagenet64", (1.526,)),
        ("cd-imagenet64", (1.382,)),
        ("ct-imagenet64", (1.913,)),
        ("cd-cifar10", ()),
    ],
)
def test_two_step_levels(name: str, levels: tuple[float, ...]) -> None:
    assert RECIPES[name]().sampler.sigmas == pytest.approx(levels, abs=5e-4)


@pytest.mark.parametrize("name", ["ict-cifar10", "ict-imagenet64"])
def test_ict_deep_has_twice_the_blocks(name: str) -> None:
    plain, deep = RECIPES[name](), RECIPES[name.replace("ict", "ict-deep")]()
    assert deep.network.num_blocks == 2 * plain.network.num_blocks


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("name", ["cd_cifar10", "cd_imagenet64", "ct_cifar10", "ct_imagenet64"])
def test_lpips_where_it_is_installed(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "lpips_installed", lambda: installed)
    run: Experiment = getattr(consistency, name)()
    assert run.method.distance == Distance(kind="perceptual" if installed else "l2")
    pooling = "lpips-average" if name.endswith("imagenet64") else "lpips"
    assert run.given.get("features") == (pooling if installed else None)


@pytest.mark.parametrize("name", ["dmd-cifar10", "dmd-imagenet64"])
def test_dmd_pools_as_its_successor_s_regression(name: str) -> None:
    assert RECIPES[name]().given["features"] == "lpips-average"


@pytest.mark.parametrize("name", ["ctm-cifar10", "ctm-imagenet64"])
def test_ctm_pools_by_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency_trajectory, "lpips_installed", lambda: True)
    assert RECIPES[name]().given["features"] == "lpips-average"


@pytest.mark.parametrize("name", ["ctcd_cifar10", "ctcd_cifar10_stop_gradient", "ctct_cifar10", "pd_cifar10"])
def test_runs_without_lpips_do_not_ask_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "lpips_installed", lambda: True)
    assert "features" not in getattr(consistency, name)().given


def test_half_precision_has_its_channels_together() -> None:
    """What a U-Net's convolutions and group norm's kernels of a GPU are fastest with; others have no such format."""
    for name, make in RECIPES.items():
        run = make()
        if run.training.precision != "fp32" and isinstance(run.network, UNetConfig | None):
            assert run.training.channels_last, name
