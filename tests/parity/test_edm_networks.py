"""Our networks against numbers of the published ones (Karras et al. 2022), read in through `from_official`.

data/edm_nets.json holds the rule that makes weights and inputs, and says from which commit the outputs are;
data/edm_nets.npz holds the outputs. Bar: 5e-5 absolute; float32 rounding alone moves outputs by about 1e-5.
"""

import json
import zlib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from imagewright.interop.official import from_official
from imagewright.methods.consistency import ConsistencyDistillation
from imagewright.methods.consistency_limits import ContinuousTimeDistillation
from imagewright.methods.consistency_trajectory import ConsistencyTrajectory
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation
from imagewright.methods.dmd2 import DMD2
from imagewright.methods.multistep_consistency import MultistepConsistencyDistillation
from imagewright.methods.progressive_distillation import ProgressiveDistillation
from imagewright.models.preconditioning import EDMPrecond, VPPrecond
from imagewright.types import Condition, DataSpec, UserError

DISTILLATIONS = (
    ConsistencyDistillation(),
    ContinuousTimeDistillation(),
    ContinuousConsistencyDistillation(),
    ConsistencyTrajectory(),
    MultistepConsistencyDistillation(),
    ProgressiveDistillation(),
    DMD2(),
)
DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "edm_nets.json").read_text())
CONFIGS = REFERENCE["configs"]
CASES = [(name, case) for name, entry in CONFIGS.items() for case in entry["cases"]]


def normal(key: str, shape: list[int]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed=zlib.crc32(key.encode())))
    return np.asarray(generator.standard_normal(shape)).astype(np.float32)


def official_state(name: str) -> dict[str, np.ndarray]:
    """Weights by the rule; the constants, whose values the rule leaves to the network, are left out."""
    return {
        key: normal(key, shape) * np.float32(mul) + np.float32(add)
        for key, shape, mul, add in CONFIGS[name]["params"]
        if mul is not None
    }


def case_inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    given = REFERENCE["inputs"]
    x, augment = given["x"], given["augment_labels"]
    factors = np.asarray(x["mul"], np.float32)[:, None, None, None]
    cond = Condition(
        label=torch.tensor(given["class_labels"]["index"]) if case["class_labels"] else None,
        augment=torch.from_numpy(normal(augment["key"], augment["shape"])) if case["augment_labels"] else None,
    )
    return (
        torch.from_numpy(normal(x["key"], x["shape"]) * factors),
        torch.tensor(given["sigma"]["value"]),
        cond,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_ones_that_were_used(name):
    state = official_state(name)
    assert sha256(b"".join(v.tobytes() for v in state.values())).hexdigest() == CONFIGS[name]["weights_sha256"]
    model = from_official(state, kind="edm", config=CONFIGS[name]["config"])
    assert sum(p.numel() for p in model.parameters()) == CONFIGS[name]["num_parameters"]
    assert not model.training


@pytest.mark.parametrize(("name", "case"), CASES)
def test_outputs_agree(name, case):
    model = from_official(official_state(name), kind="edm", config=CONFIGS[name]["config"])
    entry = CONFIGS[name]["cases"][case]
    x, sigma, cond = case_inputs(entry)
    with np.load(DATA / "edm_nets.npz") as outputs, torch.no_grad():
        scalings = model.scalings(sigma)
        raw = model.network(scalings.c_in[:, None, None, None] * x, scalings.c_noise, cond)
        np.testing.assert_allclose(scalings.c_noise, entry["noise_labels_c_noise"], rtol=1e-6)
        np.testing.assert_allclose(raw, outputs[entry["F"]], rtol=0, atol=5e-5)
        np.testing.assert_allclose(model(x, sigma, cond), outputs[entry["D"]], rtol=0, atol=5e-5)


# --- reading a checkpoint -----------------------------------------------------------------------------------

NAME = "edm_ddpmpp"


def read(config: dict | None = None, **changes: np.ndarray | torch.Tensor | None) -> EDMPrecond:
    """`from_official` on the first network, with entries of its state replaced, added or dropped (None)."""
    state = {k: v for k, v in (official_state(NAME) | changes).items() if v is not None}
    return from_official(state, kind="edm", config=CONFIGS[NAME]["config"] | (config or {}))


def test_constants_may_be_present_and_tensors_of_any_float_type():
    plain = read()
    constants = {
        key: torch.full(shape, 0.25, dtype=torch.float64)
        for key, shape, mul, _ in CONFIGS[NAME]["params"]
        if mul is None
    }
    assert constants
    with_constants = read(**constants)
    for a, b in zip(plain.state_dict().values(), with_constants.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_import_knows_the_range_of_each_published_model():
    assert (read().sigma_min, read().sigma_max) == (0.002, 80)
    ve = read({"precond_class": "VEPrecond"})
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 100)
    vp = read({"precond_class": "VPPrecond"})
    assert (vp.sigma_min, vp.sigma_max) == pytest.approx((0.001, 152), rel=0.03)
    given = read({"sigma_min": 0.002, "sigma_max": "inf", "sigma_data": 0.4, "use_fp16": True})
    assert (given.sigma_min, given.sigma_max, given.sigma_data) == (0.002, float("inf"), 0.4)


@pytest.mark.parametrize("method", DISTILLATIONS, ids=lambda m: type(m).__name__)
def test_every_distillation_takes_an_imported_model_as_teacher(method):
    student = method.parts(teacher=read(), spec=DataSpec(name="toy", resolution=16, channels=3, num_classes=10))
    module = student.roles[method.product].module
    assert (module.sigma_min, module.sigma_max) == (0.002, 80)


def test_the_other_preconditionings_read_the_same_network():
    assert isinstance(read({"precond_class": "VPPrecond", "beta_d": 15.0}), VPPrecond)
    config = CONFIGS[NAME]["config"] | {"precond_class": "iDDPMPrecond", "M": 10}
    state = official_state(NAME)
    for key in ("model.dec.16x16_aux_conv.weight", "model.dec.16x16_aux_conv.bias"):
        state[key] = np.concatenate([state[key]] * 2)
    model = from_official(state, kind="edm", config=config)
    assert model.network.config.out_channels == 6
    from_official(state | {"u": model.u.numpy()}, kind="edm", config=config)
    with pytest.raises(UserError, match="constant 'u' is not the one that C_1, C_2 and M"):
        from_official(state | {"u": model.u.numpy() * 2}, kind="edm", config=config)


def test_misfits_are_named():
    weight = "model.map_layer0.weight"
    with pytest.raises(UserError, match=f"missing: '{weight}'$"):
        read(**{weight: None})
    with pytest.raises(UserError, match=r"surplus: 'model\.extra'$"):
        read(**{"model.extra": np.zeros(2)})
    with pytest.raises(UserError, match=rf"wrong shape: '{weight}' \[2, 2\] instead of \[64, 16\]$"):
        read(**{weight: np.zeros((2, 2))})
    with pytest.raises(UserError, match=r"surplus: 'u'$"):
        read(u=np.zeros(1001))
    with pytest.raises(UserError, match=r"'model\.map_layer0\.weight' is a list; it must be a tensor or an array"):
        read(**{weight: [1.0]})


def test_at_most_ten_misfits_are_listed():
    with pytest.raises(UserError, match="and 135 more; surplus: ") as error:
        from_official({f"extra.{i}": np.zeros(1) for i in range(31)}, kind="edm", config=CONFIGS[NAME]["config"])
    missing, surplus = str(error.value).split("surplus")
    assert missing.count("'model.") == 10
    assert surplus.count("'extra.") == 10
    assert surplus.endswith("and 21 more")


def test_a_filter_that_contradicts_the_configuration_is_refused():
    key = "model.enc.8x8_down.conv0.resample_filter"
    with pytest.raises(UserError, match=f"constant '{key}' is not the one that resample_filter"):
        read(**{key: np.ones((1, 1, 4, 4))})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"precond_class": "EDMPrecon"},
            "precond_class 'EDMPrecon', which is unknown; did you mean 'EDMPrecond'",
        ),
        ({"model_type": "SongUnet"}, "model_type 'SongUnet', which is unknown; did you mean 'SongUNet'"),
        (
            {"channels_mult": [1]},
            "'channels_mult', unknown to EDMPrecond with SongUNet; did you mean 'channel_mult'",
        ),
        ({"beta_d": 1.0}, "'beta_d', unknown to EDMPrecond with SongUNet"),
        ({"in_channels": 3}, "'in_channels', unknown to"),
        ({"sigma_max": "huge"}, "sigma_max is 'huge'; it must be a number"),
        ({"img_channels": "3"}, "in_channels is '3'; it must be a whole number"),
    ],
)
def test_bad_configurations_are_refused(config, sentence):
    with pytest.raises(UserError, match=sentence):
        read(config)


def test_needs_and_kinds_are_named():
    with pytest.raises(UserError, match="config of an EDM checkpoint needs img_channels"):
        from_official({}, kind="edm", config={"precond_class": "EDMPrecond", "img_resolution": 8})
    with pytest.raises(UserError, match="no kind of official checkpoint is called 'edn'; did you mean 'edm'"):
        from_official({}, kind="edn", config={})
