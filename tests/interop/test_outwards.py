"""Graphs, cards and the hub: what goes out says the same as the model, and comes back as it went."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from imagewright.cli.main import main
from imagewright.interop import graphs
from imagewright.interop.card import write_card
from imagewright.interop.graphs import write_onnx, write_program
from imagewright.interop.hub import load_from_hub, push
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.pretrained import find_model
from imagewright.types import Condition, DataSpec, UserError

SPEC = DataSpec(name="toy | set", resolution=4, channels=1, num_classes=3)


def network() -> SongUNet:
    torch.manual_seed(0)
    config = SongUNetConfig(
        img_resolution=4, in_channels=1, out_channels=1, label_dim=3, model_channels=4, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(),
    )  # fmt: skip
    made = SongUNet(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def model_folder(folder: Path) -> ModelFile:
    file = ModelFile(
        model=EDMPrecond(network()), spec=SPEC, sampler={"class": "heun", "num_steps": 2}, origin={"a": "b"}
    )
    save_model(folder, file)
    return load_model(folder)


def test_a_program_of_torch_export_answers_for_any_number_of_pictures(tmp_path, capsys):
    file = model_folder(tmp_path / "m")
    main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "a.pt2"), "--format", "torch"])
    program = torch.export.load(tmp_path / "a.pt2").module()
    for n in (1, 5):
        x, label, sigma = torch.randn(n, 1, 4, 4), torch.arange(n) % 4 - 1, torch.full((n,), 3.0)
        with torch.no_grad():
            wanted = file.model(x, sigma, Condition(label=label))
        torch.testing.assert_close(program(x=x, sigma=sigma, label=label), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "a.pt2"), "--format", "torch"])
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ConsistencyModel, TrajectoryModel])
def test_the_graph_of_a_flow_map_is_its_one_step(kind):
    model = kind.from_denoiser(EDMPrecond(network())).eval()
    noise, cond = torch.randn(2, 1, 4, 4), Condition(label=torch.tensor([1, -1]))
    with torch.no_grad():
        found = graphs._graph(model, SPEC)[0](noise, cond.label)
        wanted = model(80 * noise, torch.full((2,), 80.0), torch.zeros(2), cond)
    assert torch.equal(found, wanted)


def test_an_onnx_file_is_checked_with_onnxruntime(tmp_path):
    import onnxruntime

    model = ConsistencyModel.from_denoiser(EDMPrecond(network())).eval()
    assert write_onnx(tmp_path / "a.onnx", model, SPEC) < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    noise, label = torch.randn(3, 1, 4, 4), torch.tensor([2, -1, 0])
    (found,) = session.run(None, {"noise": noise.numpy(), "label": label.numpy()})
    with torch.no_grad():
        wanted = model.start(80 * noise, torch.full((3,), 80.0), Condition(label=label))
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)


def test_an_onnx_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    class Wrong:
        def __init__(self, *_, **__):
            pass

        def get_inputs(self):
            return [types.SimpleNamespace(name="noise"), types.SimpleNamespace(name="label")]

        def run(self, _, given):
            return (given["noise"] + 1e3,)

    inputs = {"noise": torch.zeros(2, 1, 4, 4), "label": torch.zeros(2)}
    monkeypatch.setattr(graphs, "_exported", lambda *_: (None, inputs, inputs["noise"]))
    fake = types.SimpleNamespace(InferenceSession=Wrong)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: types.SimpleNamespace(save=lambda path: None))
    with pytest.raises(UserError, match="onnxruntime answers otherwise than the model"):
        write_onnx(tmp_path / "a.onnx", ConsistencyModel.from_denoiser(EDMPrecond(network())).eval(), SPEC)
    assert not (tmp_path / "a.onnx").exists()


def test_what_has_no_graph_and_what_is_not_installed_is_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a Linear is no denoiser and no one-step generator"):
        write_program(tmp_path / "a.pt2", torch.nn.Linear(1, 1), SPEC)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'imagewright\[onnx\]'"):
        write_onnx(tmp_path / "a.onnx", EDMPrecond(network()), SPEC)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'imagewright\[hub\]'"):
        load_from_hub("hub:a/b")


def test_a_card_says_what_the_folder_says(tmp_path):
    file = model_folder(tmp_path)
    scores = {"format": "imagewright-metrics/1", "reports": []}
    for weights, value in ((file.weights_sha256, 1.25), ("0" * 64, 9.75)):
        report = {"scores": {"fd_toy": value}, "num_images": 5000, "notes": []}
        scores["reports"].append({"sampler": {"class": "heun"}, "nfe": 3, "report": report, "weights_sha256": weights})
    import json

    (tmp_path / "metrics.json").write_text(json.dumps(scores))
    write_card(tmp_path, tmp_path / "metrics.json")
    card = (tmp_path / "README.md").read_text()
    assert "# toy / set: denoiser" in card  # a name is no part of a table
    assert "`EDMPrecond` around a `SongUNet`" in card and "1 x 4 x 4, 3 classes" in card
    assert file.weights_sha256 in card
    assert "1.25" in card and "9.75" not in card  # a score of other weights is not shown


class Hub:
    """As much of a hub as a folder on this disk can be."""

    def __init__(self, place: Path) -> None:
        self.place, self.asked = place, []

    def create_repo(self, repo_id, repo_type, private, exist_ok):
        assert repo_type == "model" and exist_ok
        (self.place / repo_id).mkdir(parents=True, exist_ok=True)
        self.asked.append(private)

    def upload_folder(self, repo_id, repo_type, folder_path, allow_patterns):
        for name in allow_patterns:
            if (Path(folder_path) / name).exists():
                shutil.copy(Path(folder_path) / name, self.place / repo_id)
        return f"hub/{repo_id}"

    def snapshot_download(self, repo_id, revision, allow_patterns):
        if not (self.place / repo_id).exists():
            raise RuntimeError(f"404: no {repo_id}\nand more")
        return str(self.place / repo_id)


def test_a_model_goes_to_a_hub_and_comes_back(tmp_path, monkeypatch, capsys):
    file = model_folder(tmp_path / "m")
    (tmp_path / "m/secret.txt").write_text("stays here")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    main(["push", str(tmp_path / "m"), "me/toy", "--private"])
    assert "pushed to hub/me/toy" in capsys.readouterr().out and hub.asked == [True]
    assert sorted(p.name for p in (tmp_path / "hub/me/toy").iterdir()) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]
    assert find_model("hub:me/toy").weights_sha256 == file.weights_sha256
    with pytest.raises(UserError, match=r"hub:me/none could not be loaded: 404: no me/none$"):
        load_from_hub("hub:me/none")
    for bad in ("hub:", "hub:a", "hub:../x/y", "hub:a/b/c", "hub:a/b@"):
        with pytest.raises(UserError, match="is no name on a hub"):
            find_model(bad)
    with pytest.raises(UserError, match="is no name on a hub"):
        push(tmp_path / "m", "a/b@c", hub=hub)


def test_the_command_exports_each_format_once(tmp_path, capsys):
    model_folder(tmp_path / "m")
    main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "copy")])
    assert (tmp_path / "copy/README.md").exists()
    capsys.readouterr()
    for words, sentence in (
        (("--out", tmp_path / "copy"), "already holds a model"),
        (("--out", tmp_path / "x", "--format", "diffusers"), "diffusers has no equal of an EDMPrecond"),
        (("--out", tmp_path / "x", "--format", "diffusers", "--half"), "--half stores a model folder"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path / "m"), *map(str, words)])
        assert sentence in " ".join(capsys.readouterr().err.split())
