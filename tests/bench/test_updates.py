"""Costs of updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from imagewright.bench.updates import Updates, measure_updates
from imagewright.cli.main import main
from imagewright.files import read_json
from imagewright.methods.dmd import DMD
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.uni_instruct import UniInstruct
from imagewright.networks import SongUNetConfig, UNet
from imagewright.recipes import RECIPES
from imagewright.training.experiment import run_experiment

BASE = RECIPES["edm-digits"]()
NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                         num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip


def test_all_that_one_update_of_the_product_takes_is_counted(tmp_path: Path) -> None:
    training = replace(BASE.training, total_images=8, batch=8)
    teacher = run_experiment(replace(BASE, network=NETWORK, training=training), tmp_path / "teacher")
    matching = replace(RECIPES["dmd2-digits"]()).giving(teacher=str(teacher))
    experiments = {
        "edm": replace(BASE, network=NETWORK),
        "dmd2": replace(matching, method=DMD2(fake_updates=3)),
        "dmd": replace(matching, method=DMD(), data=replace(matching.data, couplings="no such folder")),
        "uni": replace(matching, method=UniInstruct(fake_only_images=100)),
    }
    costs = {c.recipe: c for c in measure_updates(experiments, "edm", torch.device("cpu"), rounds=3, batch=4)}
    assert list(costs) == list(experiments)
    assert {name: c.updates for name, c in costs.items()} == {
        "edm": {"denoiser": 1},
        "dmd2": {"fake_score": 3, "generator": 1},
        "dmd": {"generator": 1, "fake_score": 1},
        "uni": {"fake_score": 1, "generator": 1},
    }
    alone = costs["edm"].learning
    assert costs["edm"].frozen == 0 and costs["uni"].learning == 2 * alone and costs["uni"].frozen == alone
    assert costs["dmd2"].learning > 2 * alone  # the adversary's head
    assert all(c.low <= c.ratio <= c.high and c.seconds > 0 for c in costs.values())
    assert all(c.passes > 0 for c in costs.values())


def test_the_passes_of_an_update_are_its_calls_with_and_without_gradient(tmp_path: Path) -> None:
    training = replace(BASE.training, total_images=8, batch=8)
    run_experiment(replace(BASE, network=NETWORK, training=training), tmp_path / "teacher")
    cd = RECIPES["cd-digits"]().giving(teacher=str(tmp_path / "teacher"))
    calls: list[tuple[bool, bool]] = []

    def noted(network: Any, args: Any, made: Any) -> None:
        calls.append((torch.is_grad_enabled(), made.requires_grad))

    again = Updates(cd, torch.device("cpu"), 4).passes()
    with register_module_forward_hook(lambda m, args, made: noted(m, args, made) if isinstance(m, UNet) else None):
        again()
    # Heun's two calls of the teacher and the target's one; the student's, and back.
    assert sorted(calls) == [(False, False)] * 3 + [(True, True)]


def test_figures_are_written(tmp_path: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "updates.json"
    main(["bench", "updates", "--against", str(tiny_recipe), "--rounds", "3", "--batch", "2", "--out", str(out)])
    record = read_json(out)
    assert record["format"] == "imagewright-updates/1"
    assert record["results"][0]["updates"] == {"denoiser": 1}
    assert "denoiser 1" in capsys.readouterr().out


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "updates", "edm-digits", "--rounds", "1"])
    assert "--rounds is 1; it must be a whole number >= 3" in capsys.readouterr().err
