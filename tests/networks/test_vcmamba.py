"""VCMamba: its official counts and answers, the orders of its scans, and the scan against its recurrence."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from imagewright.cli.main import main
from imagewright.interop.reading import read_official
from imagewright.interop.vcmamba import from_vcmamba, official_name, sizes_of
from imagewright.models.files import load_model
from imagewright.networks.selective_scan import selective_scan
from imagewright.networks.vcmamba import SIZES, ConvBlock, GridScan, MambaBlock, VCMamba, VCMambaConfig, snakes
from imagewright.noise import BatchNoise
from imagewright.training.footprint import footprint
from imagewright.types import DataSpec, UserError

TINY = VCMambaConfig(img_resolution=8, in_channels=1, num_classes=3, widths=(4, 6), depths=(1, 2), mamba=1, stem=1)


@pytest.mark.parametrize(
    ("size", "count", "gmacs"), [("S", 10_478_720, 1.1), ("M", 21_072_176, 2.3), ("B", 31_450_832, 4.0)]
)
def test_counts_are_the_official_programs(size: str, count: int, gmacs: float) -> None:
    """Parameters to the last one; operations as published (a multiply-add counts 2 here)."""
    with torch.device("meta"):
        network = VCMamba(VCMambaConfig(img_resolution=224, **SIZES[size]))
    assert sum(p.numel() for p in network.parameters()) == count
    cost = footprint(network, DataSpec(name="imagenet", resolution=224, channels=3, num_classes=1000))
    assert cost is not None and cost.flops / 2e9 == pytest.approx(gmacs, abs=0.1)


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(3, 4), (4, 3), (5, 5), (4, 4), (1, 3)])
def test_orders_are_snakes_and_moves_say_how_cells_are_entered(sides: tuple[int, int]) -> None:
    height, width = sides
    orders, moves = snakes(height, width)
    steps = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}
    for order, move in zip(orders, moves, strict=True):
        assert torch.equal(order[order.argsort()], torch.arange(height * width))
        assert move[0] == 0
        for a, b, told in zip(order.tolist(), order[1:].tolist(), move[1:].tolist(), strict=False):
            down, right = steps[told]
            assert (b // width, b % width) == (a // width + down, a % width + right)
    assert torch.equal(orders[1], orders[0].flip(0)) and torch.equal(orders[3], orders[2].flip(0))
    assert orders[:, 0].tolist()[::2] == [0, 0]
    if min(sides) > 1:
        assert orders[0, 1] == 1 and orders[2, 1] == width


# --- the scan ---------------------------------------------------------------------------------------------------------


def plain(u: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """The recurrence, cell by cell."""
    h, answers = torch.zeros(*u.shape[1:], rate.shape[1], dtype=u.dtype), []
    for k in range(len(u)):
        h = torch.exp(step[k][..., None] * rate) * h + (step[k] * u[k])[..., None] * b[k][:, None]
        answers.append((h * c[k][:, None]).sum(-1) + skip * u[k])
    return torch.stack(answers)


def inputs(length: int = 7, n: int = 2, inner: int = 3, states: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (length, n, inner), (length, n, inner), (inner, states), (length, n, states), (length, n, states), (inner,)
    u, step, rate, b, c, skip = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return [t.requires_grad_() for t in (u, step.exp(), -rate.exp(), b, c, skip)]


@pytest.mark.parametrize("chunk", [1, 3, 7, 50, None])
def test_a_scan_is_its_recurrence_however_it_is_cut(chunk: int | None) -> None:
    given = inputs()
    found, wanted = selective_scan(*given, chunk=chunk), plain(*given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), given) for y in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_its_gradient_is_that_of_differences() -> None:
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, chunk=2), inputs(5, 1, 2, 2))


def test_long_steps_and_many_places_overflow_nothing() -> None:
    """Where products of decays are taken apart, e^(-2000) is divided by itself."""
    u, step, rate, b, c, skip = (t.detach().float() for t in inputs(300, 1, 2, 2))
    found = selective_scan(u, step + 100, rate, b, c, skip, chunk=17)
    assert found.isfinite().all()
    torch.testing.assert_close(found, plain(u, step + 100, rate, b, c, skip), rtol=1e-4, atol=1e-3)


def test_what_is_kept_for_backward_grows_with_the_cells() -> None:
    def kept(side: int) -> int:
        block, bytes_of = MambaBlock(4), 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal bytes_of
            bytes_of += tensor.nbytes
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            block(torch.randn(2, 4, side, 2 * side))
        return bytes_of

    small, large = kept(4), kept(8)
    assert 3.5 < large / small < 4.1  # of four times as many cells


# --- the part that scans ----------------------------------------------------------------------------------------------


def wide(*, official_compat: bool, scans: int = 4) -> GridScan:
    torch.manual_seed(0)
    part = GridScan(8, official_compat=official_compat, scans=scans).double().eval()
    torch.nn.init.normal_(part.moves)
    torch.nn.init.normal_(part.told.weight, std=0.3)
    return part


@pytest.mark.parametrize("official_compat", [False, True])
def test_cells_are_scanned_in_four_orders_and_put_back(official_compat: bool) -> None:
    """Each order by hand; with the released quirk steps, B and C stay where they are and are met in raster order."""
    part, (height, width) = wide(official_compat=official_compat), (3, 5)
    draw = torch.Generator().manual_seed(1)
    u, step, b, c = (torch.randn(15, 2, 16, generator=draw, dtype=torch.float64) for _ in range(4))
    found = part._scanned(u, step.exp(), b, c, height, width)
    wanted = torch.zeros_like(found)
    for order, move in zip(*snakes(height, width), strict=True):
        at = torch.arange(15) if official_compat else order
        told = step.exp()[at], -part.log_rate.exp(), b[at] + part.moves[move][:, None], c[at]
        wanted[order] += plain(u[order], *told, part.skip)
    torch.testing.assert_close(found, wanted)


def test_without_memory_a_cell_hears_of_its_window_alone() -> None:
    """A -> -inf and no moves: y = (C . B) step u + D u, the same in every direction."""
    part = wide(official_compat=False)
    torch.nn.init.constant_(part.log_rate, 30.0)
    torch.nn.init.zeros_(part.moves)
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    u = F.silu(part.near(part.enter(x))).flatten(2).permute(2, 0, 1)
    step, b, c = part.told(u).split([1, 16, 16], 2)
    step = F.softplus(part.steps(step))
    wanted = 4 * ((b * c).sum(2, keepdim=True) * step * u + part.skip * u)
    torch.testing.assert_close(part._scanned(u, step, b, c, 9, 9), wanted)
    moved = x.clone()
    moved[..., 0, 0] += 1
    changed = (part(moved) - part(x)).abs().amax((0, 1)) > 0
    assert changed[:4, :4].all() and not changed[4:].any() and not changed[:, 4:].any()


@pytest.mark.parametrize(("scans", "heard"), [(1, False), (4, True)])
def test_only_four_scans_carry_news_upwards(scans: int, heard: bool) -> None:
    part = wide(official_compat=False, scans=scans)
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    moved = x.clone()
    moved[..., 8, 8] += 1
    assert bool(((part(moved) - part(x))[..., 0, 0].abs() > 0).any()) == heard


def test_steps_begin_as_in_mamba_or_as_released() -> None:
    bias = F.softplus(GridScan(64, official_compat=False, scans=4).steps.bias.detach())
    assert 0.001 <= bias.min() < 0.01 and 0.03 < bias.max() <= 0.1001
    part = GridScan(64, official_compat=False, scans=4)  # whose steps are told by 4 numbers
    assert 0.48 < part.steps.weight.abs().max() <= 0.5 and (part.skip == 1).all()
    assert not GridScan(8, official_compat=True, scans=4).steps.bias.any()


# --- blocks and the whole ---------------------------------------------------------------------------------------------


def test_weights_begin_as_the_released_ones() -> None:
    """Deviations 0.02, less what is cut; LeCun's of the stem; torch's own of other convolutions, and no bias."""
    torch.manual_seed(0)
    sizes = {"img_resolution": 128, "widths": (64, 96), "depths": (1, 2), "num_classes": 40}
    network = VCMamba(VCMambaConfig(**sizes, mamba=1, official_compat=True))
    scanning = network.stages[1][1]
    cut = 0.02 * 0.8796
    drawn = [
        network.head.weight,
        network.taught.weight,
        network.place,
        scanning.mlp.one.weight,
        scanning.mlp.two.weight,
    ]
    mlp, ssm, stem = scanning.mlp, scanning.ssm, network.stem
    for weight in (*drawn, mlp.one.weight, mlp.two.weight, ssm.told.weight, ssm.steps.weight):
        assert weight.detach().std() == pytest.approx(cut, rel=0.1) and weight.detach().abs().max() <= 0.04
    assert scanning.ssm.moves.detach().std() == pytest.approx(cut, rel=0.3)
    for conv in (network.stem[0], network.stem[3]):
        fan = conv.weight[0].numel()
        assert conv.weight.detach().std() == pytest.approx(fan**-0.5, rel=0.1)
    for conv in (scanning.mlp.middle, scanning.ssm.near, scanning.ssm.enter[0], scanning.ssm.leave[1]):
        assert conv.weight.detach().abs().max() == pytest.approx(conv.weight[0].numel() ** -0.5, rel=0.02)
    biases = (network.head.bias, network.taught.bias, mlp.one.bias, mlp.two.bias, stem[0].bias, stem[3].bias)
    assert not any(bias.any() for bias in biases)


def test_a_scan_is_done_in_32_bits_whatever_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def scan(*given: Tensor) -> Tensor:
        seen.extend(t.dtype for t in given)
        return selective_scan(*given)

    monkeypatch.setattr("imagewright.networks.vcmamba.selective_scan", scan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GridScan(8, official_compat=False, scans=4)(torch.randn(1, 8, 4, 4))
    assert len(seen) == 6 and set(seen) == {torch.float32}


def test_a_block_of_convolutions_begins_as_almost_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 5)
    change = (ConvBlock(6)(x) - x).detach().abs()
    assert 0 < change.max() < 1e-4 and change.mean() == pytest.approx(1e-5, rel=0.5)


def test_both_heads_answer_in_training_and_their_mean_after() -> None:
    network = VCMamba(TINY)
    x = torch.randn(2, 1, 8, 8)
    made = network(x)
    assert made.grid == (4, 4) and made.tokens.shape == (2, 16, 6) and made.taught.shape == (2, 3)
    torch.testing.assert_close(made.pooled, made.tokens.mean(1))
    network.eval()
    after = network(x)
    assert after.taught is None
    torch.testing.assert_close(after.logits, (network.head(after.pooled) + network.taught(after.pooled)) / 2)
    assert network(torch.randn(1, 1, 12, 12)).grid == (6, 6)  # another size: the map of positions is enlarged
    wanted = F.interpolate(network.place, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(network._placed(torch.zeros(1, 6, 6, 6)), wanted)
    odd = VCMamba(VCMambaConfig(**{**TINY.to_json(), "img_resolution": 9})).eval()
    assert odd.place.shape[2:] == odd(torch.randn(1, 1, 9, 9)).grid == (5, 5)


def test_branches_are_dropped_for_whole_images_the_later_the_more() -> None:
    network = VCMamba(VCMambaConfig(**{**TINY.to_json(), "drop_path": 0.5}))
    drops = [block.drop for stage in network.stages for block in stage]
    assert drops == [0, 0.25, 0.5]
    block = MambaBlock(4, drop=0.5).train()
    block.norm.momentum = block.again.momentum = 0.0
    x = torch.randn(1, 4, 3, 3).expand(64, -1, -1, -1).contiguous()
    with BatchNoise(0, 0, range(64), 64).for_networks(0):
        changed = (block(x) - x).abs().amax((1, 2, 3))
    assert 4 <= (changed == 0).sum() <= 30  # a quarter: neither branch
    plain = ConvBlock(4, drop=0.5).train()
    with BatchNoise(0, 0, range(64), 64).for_networks(0):
        changed = (plain(x) != x).flatten(1).any(1)
    assert 20 <= changed.sum() <= 44


def test_bad_settings_are_refused() -> None:
    for changed, told in (
        ({"mamba": 3}, r"mamba is 3; it must be in 0..2, the last depth"),
        ({"depths": (1,)}, r"depths is \(1,\); it must be a positive integer for each of the 2 widths"),
        ({"stem": 3}, r"stem is 3; it must be 1, 2 or 4"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; it must be in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=told):
            VCMambaConfig(**{**TINY.to_json(), **changed})


# --- the released program ---------------------------------------------------------------------------------------------

ASKED = {"img_resolution": 96, "num_classes": 5, "widths": [8, 12, 16, 20], "depths": [1, 1, 2, 3], "mamba": 2}
EVAL = (
    (-0.30875665288616994, -0.1865894925478403, 0.30195809287170766, 0.6092236189850442, 0.36975128893113574),
    (-0.32887204127836367, -0.18752136661722285, 0.3212561394983744, 0.627081706605488, 0.3661164755075388),
)
TRAIN = (
    (-0.42767489699674704, -0.17695180264369773, 0.4790525051816509, 0.7129328503778217, 0.15561542306643772),
    (0.3713746205397761, -0.2682102246630812, -0.4994852903383107, 0.02988428447927055, 0.7910635044276337),
)
"""Answers of Wertyuui345/VCMamba (model/mambacnn.py) at these sizes in float64, its scan done cell by cell: the mean of
both heads for two pictures; in training both heads of the first, with the batch's statistics. The program takes the
exponential of A_log in float32, which norms of a small batch enlarge."""


def official_state() -> dict[str, Tensor]:
    """Every tensor a sine, by its place among the official names."""
    with torch.device("meta"):
        network = VCMamba(VCMambaConfig(**ASKED))
    shapes = {official_name(k): v.shape for k, v in network.state_dict().items()}
    named = sorted(k for k in shapes if not k.endswith("num_batches_tracked"))
    state = {k: torch.zeros(()) for k in shapes if k.endswith("num_batches_tracked")}
    for i, key in enumerate(named):
        sine = torch.sin(torch.arange(shapes[key].numel(), dtype=torch.float64) * 0.37 + i).reshape(shapes[key])
        gain = key.endswith("running_var") or (key.endswith("weight") and sine.ndim == 1)
        state[key] = 1 + 0.3 * sine if gain else 0.3 * sine
    return state


def test_answers_are_the_released_programs() -> None:
    state = official_state()
    assert sizes_of(state) == {**ASKED, "in_channels": 3}
    network = from_vcmamba(state, sizes_of(state)).network.double()
    network.load_state_dict({k: state[official_name(k)] for k in network.state_dict()})  # undoes the round to float32
    x = torch.sin(torch.arange(2 * 3 * 96 * 96, dtype=torch.float64) * 0.011).reshape(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(x).logits, torch.tensor(EVAL, dtype=torch.float64), rtol=0, atol=1e-9)
        made = network.train()(x)
    wanted = torch.tensor(TRAIN, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([made.logits[0], made.taught[0]]), wanted, rtol=0, atol=1e-7)


def test_a_checkpoint_of_the_program_is_imported(tmp_path: Path, refused) -> None:
    state = {k: v.float() for k, v in official_state().items()}
    path = tmp_path / "VCMamba-X.pth"
    torch.save({"model": state, "epoch": 299, "scaler": "none", "args": argparse.Namespace(lr=1e-3, aa="rand")}, path)
    main(["import", str(path), "--key", "model", "--out", str(tmp_path / "model")])
    file = load_model(tmp_path / "model")
    assert file.spec.num_classes == 5 and file.spec.resolution == 96
    view = file.model.view
    assert (view.side, view.resize, view.mean, view.std) == (
        96, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )  # fmt: skip
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (view.mean, view.std))
    torch.testing.assert_close(file.model.encode(x).logits, file.model.network(((x + 1) / 2 - mean) / std).logits)
    assert file.model.encode(torch.zeros(1, 1, 64, 64)).logits.shape == (1, 5)
    told = refused("import", str(path), "--out", str(tmp_path / "other"))
    assert "--key" in told or "Namespace" in told
    del state["network.6.1.mamba.D"]
    with pytest.raises(UserError, match=r"missing: 'network\.6\.1\.mamba\.D'"):
        from_vcmamba(state, sizes_of(state))
    torch.save({"model": {"a.A_log": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="the tensors of this checkpoint are not those of vcmamba"):
        read_official(path, key="model")
