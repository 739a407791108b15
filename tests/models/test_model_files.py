"""Models on disk: there and back, half precision, and every way in which the two files can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from imagewright.models import files
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, load_model, read_model_record, save_model, weights_hash
from imagewright.models.preconditioning import EDMPrecond, VEPrecond, iDDPMPrecond
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.types import DataSpec, UserError

SPEC = DataSpec(name="test", resolution=8, channels=3, num_classes=2, class_names=("cat", "dog"))


def network(seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {
        "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 2,
        "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,),
    }  # fmt: skip
    if changes.get("out_channels") == 6:
        made = DhariwalUNet(DhariwalUNetConfig(**(arguments | changes | {"model_channels": 32})))
    else:
        made = SongUNet(SongUNetConfig(**(arguments | changes)))
    for p in made.parameters():  # the last layers start at zero, which would hide the network
        nn.init.normal_(p, std=0.05)
    return made


MODELS = {
    "edm": lambda seed=0: EDMPrecond(network(seed), sigma_max=60.0, sigma_data=0.4),
    "ncsn++": lambda seed=0: VEPrecond(
        network(seed, embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1))
    ),
    "iddpm": lambda seed=0: iDDPMPrecond(network(seed, out_channels=6), M=100),
    "consistency": lambda seed=0: ConsistencyModel(network(seed)),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def save(folder, name="edm", seed=0, **options):
    model = MODELS[name](seed)
    save_model(folder, ModelFile(model=model, spec=SPEC), **options)
    return model


def answers(model):
    """What a model says about fixed images at three levels."""
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.1, 1.0, 10.0])
    model.eval()
    with torch.no_grad():
        return model.start(x, sigma) if isinstance(model, ConsistencyModel) else model(x, sigma)


# --- there and back -------------------------------------------------------------------------------------------


@EVERY
def test_round_trip(tmp_path, name):
    model = MODELS[name]()
    sampler, origin = {"class": "heun", "num_steps": 7}, {"recipe": "test", "images": 3}
    save_model(tmp_path / "new", ModelFile(model=model, spec=SPEC, sampler=sampler, origin=origin))
    back = load_model(tmp_path / "new")
    assert (back.spec, back.sampler, back.origin) == (SPEC, sampler, origin)
    assert type(back.model) is type(model)
    assert not back.model.training
    assert torch.equal(answers(back.model), answers(model))
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"model.json", "model.safetensors"}


def test_the_weights_alone_say_what_they_are(tmp_path):
    save(tmp_path, "consistency")
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        inside = json.loads(weights.metadata()["imagewright"])
    assert inside == json.loads((tmp_path / "model.json").read_text())
    assert inside["kind"] == "flow_map"
    (tmp_path / "model.json").unlink()
    assert type(load_model(tmp_path).model) is ConsistencyModel


def test_a_model_is_there_whole_wherever_its_writer_is_stopped(tmp_path):
    """The weights are the model: a stop before they are renamed leaves the old one, after it the new one."""
    old, new = save(tmp_path / "it", seed=0), save(tmp_path / "new", seed=1)
    (tmp_path / "new/model.safetensors").replace(tmp_path / "it/model.safetensors")
    assert torch.equal(answers(load_model(tmp_path / "it").model), answers(new))
    assert read_model_record(tmp_path / "it")["weights_sha256"] == weights_hash(new.state_dict())
    assert not torch.equal(answers(old), answers(new))


def as_of_old(folder):
    """A model as earlier versions wrote it by other means: its description in model.json alone."""
    path = folder / "model.safetensors"
    save_file(load_file(path), path)


def test_a_description_in_model_json_alone_is_read(tmp_path):
    model = save(tmp_path)
    as_of_old(tmp_path)
    assert torch.equal(answers(load_model(tmp_path).model), answers(model))
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=r"model\.json does not exist"):
        load_model(tmp_path)


@EVERY
def test_half_stores_parameters_in_half_and_loads_float32(tmp_path, name):
    model = save(tmp_path, name, half=True)
    parameters = dict(model.named_parameters())
    stored = load_file(tmp_path / "model.safetensors")
    for key, tensor in stored.items():
        assert tensor.dtype == (torch.float16 if key in parameters else torch.float32)
    back = load_model(tmp_path).model
    assert all(t.dtype == torch.float32 for t in [*back.parameters(), *back.buffers()])
    for key, parameter in back.named_parameters():
        # Half an ulp of float16; values below 2^-14 have the spacing 2^-24.
        bound = (parameters[key].abs() * 2**-11).clamp(min=2**-25)
        assert ((parameter - parameters[key]).abs() <= bound).all()
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in back.named_buffers())
    want = answers(model)
    assert 0 < float((answers(back) - want).abs().max()) < 0.01 * float(want.abs().max())


def test_the_buffers_that_matter_are_there():
    assert "network.map_noise.freqs" in MODELS["ncsn++"]().state_dict()  # half precision would break it
    assert "u" in dict(MODELS["iddpm"]().named_buffers())


def test_hash_sees_names_types_shapes_and_values():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.zeros(2, 3)}
    others = [
        state | {"a": torch.zeros(3, 2)},
        state | {"a": torch.zeros(2, 3, dtype=torch.float64)},
        state | {"b": torch.full((1,), 2.0)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
    ]
    assert weights_hash(same) == weights_hash(state)
    assert len({weights_hash(s) for s in [state, *others]}) == 5


# --- what can be wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.json", "model.safetensors"])
def test_missing_and_damaged_files_are_named(tmp_path, file):
    save(tmp_path)
    if file == "model.json":
        as_of_old(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{path} is not"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{path} does not exist"):
        load_model(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{path} does not hold the weights that its description is of"):
        load_model(tmp_path)


def test_weights_of_another_model_are_noticed(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, seed=0)
    as_of_old(first)
    save(second, seed=1)
    as_of_old(second)
    (second / "model.safetensors").replace(first / "model.safetensors")
    with pytest.raises(UserError, match=r"first/model\.safetensors does not hold the weights"):
        load_model(first)


def edit(folder, **changes):
    """Change entries of the description; None removes one."""
    header = json.loads((folder / "model.json").read_text()) | changes
    kept = {k: v for k, v in header.items() if k not in changes or v is not None}
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"imagewright": json.dumps(kept)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"format": "imagewright-model/9"},
            "has format 'imagewright-model/9'; this version reads 'imagewright-model/1'",
        ),
        ({"format": None}, "has format None"),
        ({"model": None}, "is damaged: it lacks the entry 'model'"),
        ({"data": {"name": "test"}}, "is damaged: data lacks the entry 'resolution'"),
        ({"data": {"name": "test", "class_names": []}}, "is damaged: .*resolution"),
        ({"model": {"class": "EDMPrecon"}}, "is damaged: .*'EDMPrecon'; did you mean 'EDMPrecond'"),
        ({"weights_sha256": "0"}, "does not hold the weights"),
    ],
)
def test_headers_that_say_something_else_are_refused(tmp_path, changes, sentence):
    save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"^{tmp_path}/model\.safetensors(: its description)? {sentence}"):
        load_model(tmp_path)


def test_a_header_that_is_no_object_is_refused(tmp_path):
    save(tmp_path)
    as_of_old(tmp_path)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(UserError, match=r"model\.json has format a list of 0"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state.pop("network.out_conv.weight", None) or state.popitem()
    save_file(state, path)
    edit(tmp_path, weights_sha256=weights_hash(state))
    with pytest.raises(UserError, match=r"model\.safetensors does not fit its description: it lacks ") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


# --- atomic writing -------------------------------------------------------------------------------------------


def test_a_failing_save_leaves_the_old_model_whole(tmp_path, monkeypatch):
    save(tmp_path, seed=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = ModelFile(model=MODELS["edm"](1), spec=SPEC)

    def disk_full(state, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", disk_full)
        with pytest.raises(UserError, match="No space left"):
            save_model(tmp_path, new)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for origin in ({"loss": float("nan")}, {"path": tmp_path}):
        with pytest.raises((ValueError, TypeError)):
            save_model(tmp_path, ModelFile(model=new.model, spec=SPEC, origin=origin))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    save_model(tmp_path, new)
    assert torch.equal(answers(load_model(tmp_path).model), answers(new.model))
