"""DisCo-Diff's two stages as runs: resumed with the same bits, from a plain denoiser, one model of both, a chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imagewright.cli.dry_run import StandIns
from imagewright.cli.main import main
from imagewright.methods.disco_diff import DiscoDiff, LatentPrior, Transformer
from imagewright.models.discrete_latents import LatentDenoiser
from imagewright.models.files import load_model
from imagewright.networks import SongUNetConfig, TokenTransformerConfig
from imagewright.recipes import RECIPES
from imagewright.recipes.disco_diff import two_stages
from imagewright.samplers import Heun
from imagewright.training.experiment import Experiment, assemble, run_experiment

TINY = Transformer(width=8, depth=1, heads=2)
METHOD = DiscoDiff(latents=4, values=5, patch=4, encoder=TINY, told=TINY, batch_norm=True)
BASE = RECIPES["disco-digits"]()
TRAINING = replace(BASE.training, total_images=48, batch=16, micro_batch=8, log_images=16, snapshot_images=48,
                   checkpoint_images=16)  # fmt: skip
NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(8,), dropout=0.1)  # fmt: skip
FIRST = replace(BASE, method=METHOD, network=NETWORK, training=TRAINING, sampler=Heun(num_steps=1))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = replace(FIRST, training=replace(TRAINING, total_images=16))
    return run_experiment(run, tmp_path_factory.mktemp("disco") / "first")


def prior_run(teacher: Path) -> Experiment:
    network = TokenTransformerConfig(values=2, length=1, width=8, depth=1, heads=2, causal=True, post_norm=False,
                                     told_blocks=-1, dropout=0.1)  # fmt: skip
    return replace(FIRST, method=LatentPrior(), network=network).giving(teacher=str(teacher))


def test_the_first_stage_resumes(resumed_run: Callable[[Experiment], Path]) -> None:
    resumed_run(FIRST)


def test_the_second_stage_resumes_and_makes_the_whole(
    begun: Path, resumed_run: Callable[[Experiment], Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = resumed_run(prior_run(begun))
    made, before = load_model(folder).model, load_model(begun).model
    assert isinstance(made, LatentDenoiser) and made.token_model().codec.length == 4
    kept = made.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())
    main(["sample", str(folder), "--n", "2", "--guidance", "latents", "--weight", "2", "--out", str(tmp_path / "s")])
    assert "is told discrete latents, of which method ConsistencyDistillation knows nothing" in refused(
        "train", "cd-digits", "--teacher", begun, "--out", tmp_path / "student"
    )
    assert "needs a model with discrete latents and a prior" in refused(
        "sample", begun, "--n", "1", "--guidance", "latents", "--weight", "2"
    )


def test_it_starts_from_a_plain_denoiser(tmp_path: Path) -> None:
    short = replace(TRAINING, total_images=16)
    plain = run_experiment(replace(RECIPES["edm-digits"](), network=NETWORK, training=short), tmp_path / "plain")
    frozen = replace(short, optimizer=replace(short.optimizer, lr=1e-12))
    made = run_experiment(replace(FIRST, training=frozen, start=str(plain)), tmp_path / "told")
    theirs, ours = load_model(plain).model.state_dict(), load_model(made).model.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def test_both_stages_are_a_chain() -> None:
    """The prior's network takes its sizes from the latents of the stage before it."""
    chain = two_stages("disco-digits")
    assert [stage.name for stage in chain.stages] == ["denoiser", "prior"]
    works: dict[str, Any] = {stage.name: stage.work for stage in chain.stages}
    with torch.device("meta"):
        made = assemble(works["prior"], sources=StandIns(works))
    assert isinstance(made.parts.model, LatentDenoiser)
    assert (made.network.values, made.network.length, made.network.label_dim) == (16, 4, 10)
