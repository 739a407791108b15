"""Official weights come in by what they are, from files laid out as the programs write them; nothing is executed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagewright.cli.main import main
from imagewright.interop.pickled import read_network
from imagewright.interop.reading import read_official
from imagewright.interop.recognise import FORMATS, PUBLISHED
from imagewright.methods.vct import Learnt
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.coupled import CoupledConsistencyModel
from imagewright.models.files import load_model
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond, VPPrecond
from imagewright.models.timesteps import TimestepPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import EDM2UNet
from imagewright.pretrained import _FOLDER as SHIPPED
from imagewright.types import Condition, UserError

HERE = Path(__file__).parent


def beside(name: str, folder: Path = HERE):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pickling = beside("pickling", HERE.parent / "hostile")
official = beside("test_official_networks", HERE.parent / "parity")
edm = beside("test_edm_networks", HERE.parent / "parity")


def tensors(state) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}


def edm_state() -> dict[str, torch.Tensor]:
    return tensors(edm.official_state("edm_ddpmpp"))


EDM_CONFIG = edm.CONFIGS["edm_ddpmpp"]["config"]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def write_pickle(path: Path, class_name: str, state, arguments, protocol: int = 4, **more) -> Path:
    content = pickling.EasyDict(
        ema=pickling.network(class_name, state, arguments),
        loss_fn=pickling.Persistent("EDMLoss", {"P_mean": -1.2, "scale": np.float32(0.5), "raw": np.ones(3)}),
        dataset_kwargs=pickling.EasyDict(class_name="x", path="y", sizes=[1, 2], use=True),
        **more,
    )
    path.write_bytes(pickling.dumped(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_edm_pickle_says_all_itself(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    arguments = {k: v for k, v in EDM_CONFIG.items() if k != "precond_class"}
    path = write_pickle(tmp_path / "edm-cifar10.pkl", "EDMPrecond", edm_state(), arguments, protocol)
    found = read_official(path)
    assert found.kind == "edm" and type(found.model) is EDMPrecond
    assert same(found.model, edm.read())
    assert (found.spec.name, found.spec.num_classes) == ("edm-cifar10", EDM_CONFIG["label_dim"])
    assert (found.model.sigma_min, found.model.sigma_max) == (0.002, 80)
    assert not os.path.exists("OWNED")
    generator = read_official(path, kind="dmd2").model
    assert isinstance(generator, FewStepGenerator)
    vp = write_pickle(tmp_path / "vp.pkl", "VPPrecond", edm_state(), arguments)
    assert isinstance(read_official(vp).model, VPPrecond)


def test_edm2_in_half_precision_and_other_networks_of_a_pickle(tmp_path):
    entry = official.NETWORKS["edm2_cond"]
    state = {k: v.half() for k, v in tensors(official.official_state("edm2_cond")).items()}
    other = pickling.network("Precond", {k: v + 1 for k, v in state.items()}, entry["config"])
    path = write_pickle(tmp_path / "edm2.pkl", "Precond", state, entry["config"], net=other)
    found = read_official(path)
    assert found.kind == "edm2" and isinstance(found.model.network, EDM2UNet)
    assert torch.equal(found.model.network.out_gain, state["unet.out_gain"].float())
    assert torch.equal(read_official(path, key="net").model.network.out_gain, (state["unet.out_gain"] + 1).float())
    with pytest.raises(UserError, match="it has no network 'raw'; there are ema, loss_fn, net"):
        read_official(path, key="raw")
    with pytest.raises(UserError, match=r"--kind is edm; .* holds a network of edm2"):
        read_official(path, kind="edm")
    with pytest.raises(UserError, match="holds a 'EDMLoss'; read are EDMPrecond"):
        read_official(write_pickle(tmp_path / "x.pkl", "EDMLoss", {}, {}))


@pytest.mark.parametrize("name", ["edm_ddpmpp", *[n for n in edm.CONFIGS if n != "edm_ddpmpp"]])
def test_shapes_tell_the_arguments_of_edm(tmp_path, name):
    """All but the dropout, from the tensors alone."""
    entry = edm.CONFIGS[name]
    state = tensors(edm.official_state(name))
    save_file(state, tmp_path / "a.safetensors")
    # What the weights do not tell is which of two wrappers they were trained in.
    wrapper = {"precond_class": entry["config"]["precond_class"]}
    found = read_official(tmp_path / "a.safetensors", config=wrapper).model
    wanted = edm.from_official(state, kind="edm", config=entry["config"])
    assert same(found, wanted)
    told, config = found.network.config.to_json(), wanted.network.config.to_json()
    assert told | {"dropout": 0} == config | {"dropout": 0}


def test_shapes_tell_the_arguments_of_edm2(tmp_path):
    state = tensors(official.official_state("edm2_cond"))
    torch.save({"net": state}, tmp_path / "a.pt")
    found = read_official(tmp_path / "a.pt", key="net", config={"channels_per_head": 16}).model
    assert same(found, official.read("edm2_cond"))


def test_each_of_openais_networks_is_known_by_its_tensors(tmp_path):
    kinds = {"guided_new": TimestepPrecond, "consistency": ConsistencyModel, "ctm": TrajectoryModel}
    for name, kind in kinds.items():
        entry = official.NETWORKS[name]
        torch.save(tensors(official.official_state(name)), tmp_path / f"{name}.pt")
        found = read_official(tmp_path / f"{name}.pt", config=entry["config"])
        assert found.kind == entry["kind"] and type(found.model) is kind
        assert same(found.model, official.read(name))


def test_published_files_need_no_config():
    """Each is a configuration of a network that can be planned, of the size that was published."""
    from imagewright.interop.openai import network_config
    from imagewright.networks import ADMUNet

    for flags in PUBLISHED.values():
        network_config(flags, label_scale=1.0)
    # Of the model card's 296, 422, 554 and 559 million the two that differ most.
    for name, million in (("64x64_diffusion", 296), ("512x512_diffusion", 559)):
        with torch.device("meta"):
            network = ADMUNet(network_config(PUBLISHED[name], label_scale=1.0))
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == million


def test_vct_from_a_lightning_checkpoint(tmp_path):
    """The averaged network; the settings inside stand for nothing."""
    state = {k.replace("model.", "net."): v for k, v in edm_state().items()}
    whole = {f"ema.{k}": v for k, v in state.items()} | {f"model.{k}": v + 1 for k, v in state.items()}
    torch.save({"state_dict": whole, "epoch": 3, "hyper_parameters": {"cfg": {"q": 2}}}, tmp_path / "vct.ckpt")
    found = read_official(tmp_path / "vct.ckpt", config={"sigma_min": 0.003})
    assert found.kind == "vct" and type(found.model) is ConsistencyModel
    assert (found.model.sigma_min, found.model.sigma_max) == (0.003, 80)
    raw = read_official(tmp_path / "vct.ckpt", key="model")
    assert torch.equal(raw.model.network.map_layer0.weight, found.model.network.map_layer0.weight + 1)
    linear = read_official(tmp_path / "vct.ckpt", config={"kernel": "cot", "sigma_max": 40.0}).model
    assert isinstance(linear, CoupledConsistencyModel) and (linear.kernel, linear.time_max) == ("li", 40)
    with pytest.raises(UserError, match="kernel"):
        read_official(tmp_path / "vct.ckpt", config={"kernel": "vp"})
    with pytest.raises(UserError, match=r"no weights under 'avg\.'; --key names others"):
        read_official(tmp_path / "vct.ckpt", key="avg")


def test_vct_with_its_encoder(tmp_path):
    """The encoder is the same kind of network, smaller, with twice the outputs: its sizes are those of its tensors."""
    state = {k.replace("model.", "net."): v for k, v in edm_state().items()}
    torch.save(state, tmp_path / "plain.pt")
    plain = read_official(tmp_path / "plain.pt").model
    encoder = Learnt(channels=8).encoder(plain.network)
    own = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    torch.save(state | own, tmp_path / "vct.pt")
    found = read_official(tmp_path / "vct.pt").model
    assert isinstance(found, CoupledConsistencyModel) and found.kernel == "ve" and found.boundary
    assert found.encoder.config == encoder.config
    images = torch.randn(
        2, *[getattr(encoder.config, name) for name in ("in_channels", "img_resolution", "img_resolution")]
    )
    expected = encoder.eval()(2 * images, torch.zeros(2))
    assert torch.equal(found.encode(images)[0], expected[:, : encoder.config.in_channels])


def test_ctm_for_cifar10(tmp_path):
    """EDM's names and a second embedding."""
    wanted = TrajectoryModel.from_denoiser(edm.read({"augment_dim": 0}, **{"model.map_augment.weight": None}))
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {k.replace("network.", "model.").replace("_to.", "_s."): v for k, v in wanted.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    found = read_official(tmp_path / "model.pt")
    assert found.kind == "ctm-cifar10"
    x, sigma, to = torch.randn(1, 3, 16, 16), torch.tensor([5.0]), torch.tensor([1.0])
    with torch.no_grad():
        assert torch.equal(found.model(x, sigma, to), wanted.eval()(x, sigma, to))


def test_dmd2s_folder_is_a_generator(tmp_path):
    torch.save(edm_state(), tmp_path / "pytorch_model.bin")
    found = read_official(tmp_path)
    assert found.kind == "dmd2" and type(found.model) is FewStepGenerator
    assert found.model.sigma_max == 80
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="no folder of official weights"):
        read_official(tmp_path)


def test_the_command_writes_a_folder_that_samples(tmp_path, capsys):
    arguments = {k: v for k, v in EDM_CONFIG.items() if k != "precond_class"}
    path = write_pickle(tmp_path / "edm.pkl", "EDMPrecond", edm_state(), {**arguments, "sigma_max": float("inf")})
    main(["import", str(path), "--out", str(tmp_path / "m"), "--name", "toy"])
    assert "edm: EDMPrecond of 3 x 16 x 16, 10 classes, noise levels 0.002 to inf" in " ".join(
        capsys.readouterr().out.split()
    )
    loaded = load_model(tmp_path / "m")
    assert loaded.spec.name == "toy" and loaded.origin["kind"] == "edm"
    x, sigma, cond = torch.randn(1, 3, 16, 16), torch.tensor([1.0]), Condition(label=torch.tensor([3]))
    with torch.no_grad():
        assert torch.equal(loaded.model(x, sigma, cond), edm.read()(x, sigma, cond))


@pytest.mark.parametrize("form", [f for f in FORMATS if f.kind is None], ids=lambda f: f.name)
def test_what_has_no_network_here_is_named(tmp_path, form):
    names = {
        "guided-diffusion's classifier": {"out.2.positional_embedding": (2,)},
        "guided-diffusion's upsampler": {"input_blocks.0.0.weight": (4, 6, 3, 3)},
        "diffusers' UNet2DModel": {"conv_in.weight": (1,), "conv_norm_out.weight": (1,)},
        "DiT, SiT": {"final_layer.adaLN_modulation.1.weight": (1,), "x_embedder.proj.weight": (1,)},
        "VAR (DDO's var_*.pth)": {"blocks.0.ada_lin.1.weight": (1,)},
        "VQGAN, LlamaGen's tokenizer": {"quantize.embedding.weight": (1,), "encoder.conv_in.weight": (1,)},
        "ARPG": {"layers.self_dec.0.attn.to_q.weight": (1,), "layers.cross_dec.0.attn.to_q.weight": (1,)},
        "LlamaGen": {"cls_embedding.embedding_table.weight": (1,), "layers.0.attention.wqkv.weight": (1,)},
        "VCMamba": {"stages.0.A_log": (1,)},
    }[form.name]
    torch.save({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"these are weights of .*; they are not read: missing is"):
        read_official(tmp_path / "a.pt")


def test_bad_files_are_refused_in_a_sentence(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no kind of official weights has tensors like 'a'"):
        read_official(tmp_path / "a.pt")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt is not read: read are \.pkl"):
        read_official(tmp_path / "a.txt")
    with pytest.raises(UserError, match="gone does not exist"):
        read_official(tmp_path / "gone")
    for way in (SHIPPED / "emoji64-32", SHIPPED / "emoji64-32" / "model.safetensors"):
        with pytest.raises(UserError, match="is a model of imagewright's own"):
            read_official(way)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"--key .* has no effect"):
        read_official(tmp_path / "a.safetensors", key="ema")
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch OWNED'\ntR.")
    with pytest.raises(UserError, match=r"was refused: it asks for os\.system"):
        read_network(tmp_path / "evil.pkl")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="a diffusers folder, which says all itself"):
        read_official(tmp_path, kind="edm")
