"""Students behind one table of classes: the right one answers, and no other is in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imagewright.interop.graphs import write_program
from imagewright.models.description import build, describe
from imagewright.models.files import ModelFile, load_model, save_model, weights_hash
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.routed import RoutedMap
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.noise import StepNoise
from imagewright.samplers.generator import generator_from
from imagewright.types import Condition, DataSpec, UserError

SPEC = DataSpec(name="toy", resolution=8, channels=1, num_classes=5, empty_classes=(3,))
TABLE = (1, 0, 2, -1, 1)
LABELS = torch.tensor([4, 1, 2, 0, 1, 2, 4])


def student(seed: int, channels: int = 8, **changes: Any) -> FewStepGenerator:
    torch.manual_seed(seed)
    config = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=5, model_channels=channels,
                            channel_mult=(1,), num_blocks=1, attn_resolutions=())  # fmt: skip
    network = SongUNet(config)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return FewStepGenerator(network, **changes).eval().requires_grad_(False)


def routed() -> RoutedMap:
    """Students of unequal size."""
    return RoutedMap([student(0), student(1), student(2, 16)], TABLE).eval()


def asked(model: Any, labels: Tensor = LABELS) -> Tensor:
    x = 80 * StepNoise(3).normal(torch.empty(len(labels), 1, 8, 8))
    sigma = torch.full((len(labels),), 80.0)
    answer: Tensor = model(x, sigma, torch.zeros_like(sigma), Condition(label=labels))
    return answer


def stored(folder: Path) -> Any:
    save_model(folder, ModelFile(model=routed(), spec=SPEC))
    return load_model(folder).model


def test_a_mixed_batch_is_what_the_students_make_of_their_own() -> None:
    model = routed()
    together = asked(model)
    for k, one in enumerate(model.students):
        rows = torch.tensor(TABLE)[LABELS] == k
        torch.testing.assert_close(together[rows], asked(one)[rows], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together[~rows], asked(one)[~rows], atol=1e-2)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    x, sigma = StepNoise(4).normal(torch.empty(7, 1, 8, 8)), torch.full((7,), 80.0)
    straight = model.start(x, sigma, Condition(label=LABELS))
    shuffled = model.start(x[order], sigma, Condition(label=LABELS[order]))
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-4, atol=1e-5)


def test_only_the_students_that_are_needed_are_in_memory(tmp_path: Path) -> None:
    model = stored(tmp_path)
    assert model.held() == []
    for labels, needed in ((torch.tensor([1, 1]), [0]), (torch.tensor([4, 2]), [1, 2]), (torch.tensor([0]), [1])):
        torch.testing.assert_close(asked(model, labels), asked(routed(), labels), rtol=0, atol=0)
        assert model.held() == needed
    torch.testing.assert_close(asked(model), asked(routed()), rtol=0, atol=0)
    asked(model, torch.tensor([1]))
    save_model(tmp_path, ModelFile(model=RoutedMap([student(5), student(6)], (0, 0, 0, 1, 1)), spec=SPEC))
    with pytest.raises(UserError, match="is another model than it was when it was opened"):
        asked(model, torch.tensor([2]))


def test_all_of_it_is_one_model(tmp_path: Path) -> None:
    model = stored(tmp_path / "a")
    assert weights_hash(model.state_dict()) == load_model(tmp_path / "a").weights_sha256
    again = build(json.loads(json.dumps(describe(model))))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(asked(again.eval()), asked(routed()), rtol=0, atol=0)
    save_model(tmp_path / "b", load_model(tmp_path / "a"), half=True)
    assert 0 < float((asked(load_model(tmp_path / "b").model) - asked(routed())).detach().abs().max()) < 0.05
    wide = model.double()  # what is read afterwards is moved too
    assert asked(wide, torch.tensor([2])).dtype == torch.float32
    assert {p.dtype for k in wide.held() for p in wide.students[k].parameters()} == {torch.float64}


def test_it_draws_as_any_other_generator(tmp_path: Path) -> None:
    stored(tmp_path)
    generator = generator_from(load_model(tmp_path))
    drawn, labels = generator.generate(12, seed=1, batch_size=5), generator.labels(12, 1)
    assert drawn.shape == (12, 8, 8, 1) and generator.nfe == 1 and labels is not None and 3 not in labels
    generator.generate(2, labels=1)
    assert generator.model.held() == [0]


class Blur(nn.Module):
    """A network that is cheap to trace."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.classes = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(5, 1)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        assert cond.label is not None
        answer: Tensor = self.layer(x) + self.classes(cond.label)[:, :, None, None]
        return answer


def test_a_graph_asks_all_and_hears_one(tmp_path: Path) -> None:
    model = RoutedMap([FewStepGenerator(Blur(k)) for k in range(3)], TABLE).eval().requires_grad_(False)
    x, sigma = StepNoise(4).normal(torch.empty(7, 1, 8, 8)), torch.full((7,), 80.0)
    everywhere = model.start_everywhere(x, sigma, Condition(label=LABELS))
    torch.testing.assert_close(everywhere, model.start(x, sigma, Condition(label=LABELS)), rtol=1e-4, atol=1e-5)
    write_program(tmp_path / "graph.pt2", model, SPEC)
    program = torch.export.load(tmp_path / "graph.pt2").module()
    torch.testing.assert_close(program(noise=x / 80, label=LABELS), everywhere, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([1, 3]), "no student makes images of class 3"),
        (torch.tensor([-1, 0]), "every image needs a class"),
    ],
)
def test_what_nobody_makes_is_refused(labels: Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        asked(routed(), labels)
    with pytest.raises(UserError, match="every image needs a class"):
        routed().start(torch.zeros(1, 1, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match="only goes to"):
        routed()(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.ones(1), Condition(label=torch.tensor([0])))


@pytest.mark.parametrize(
    ("students", "table", "sentence"),
    [
        ([], (-1,), "there must be some"),
        ([EDMPrecond(student(0).network)], (0,), "EDMPrecond, which is no one-step"),
        ([student(0), student(1, sigma_max=40.0)], (0, 1), "noise levels"),
        ([student(0)], (0, 1), "names students"),
        ([student(0), student(1)], (0, 0), "names students"),
        ([student(0)], ("a",), "names students"),
    ],
)
def test_other_students_and_tables_are_refused(
    students: list[nn.Module], table: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        RoutedMap(students, table)


def test_a_table_of_other_classes_than_the_datas_is_damage(tmp_path: Path) -> None:
    save_model(tmp_path, ModelFile(model=RoutedMap([student(0), student(1)], (0, 1, 1, 0)), spec=SPEC))
    with pytest.raises(UserError, match=r"num_classes is 5; the table is of 4"):
        load_model(tmp_path)
