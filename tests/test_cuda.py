"""What only a GPU can show: `python -m pytest tests/test_cuda.py`; elsewhere all of it is skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewright import fused
from imagewright import noise as noise_module
from imagewright.data import Loader, open_images
from imagewright.data.loader import Turns
from imagewright.models.consistency import ConsistencyModel
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.networks.compiling import compile_network
from imagewright.networks.tangents import derivative
from imagewright.noise import BatchNoise
from imagewright.precision import exact_float32, tf32
from imagewright.pretrained import find_model, load
from imagewright.recipes import RECIPES
from imagewright.recording import recorded as record
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator
from imagewright.samplers.replay import Replay, Replays
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.graphs import kept
from imagewright.training.log import Log
from imagewright.training.trainer import Trainer
from imagewright.types import Condition, DataSpec, UserError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=(1, 2),
                         num_blocks=1, attn_resolutions=(4,), dropout=0.1)  # fmt: skip
FAMILIES = (
    "edm-digits", "cd-digits", "ct-digits", "pd-digits", "ict-digits", "mcd-digits", "ctm-digits", "trigflow-digits",
    "scd-digits", "sct-digits", "ctcd-digits", "dmd2-digits", "dmd2-digits-gan", "f-distill-digits", "sid-digits",
    "causal-digits", "md4-digits", "maskgit-digits", "arpg-digits", "vq-digits", "wrn-digits",
)  # fmt: skip


@pytest.fixture(autouse=True)
def exact() -> None:
    exact_float32()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda") / "teacher"
    return run_experiment(short("edm-digits"), folder, device=CUDA)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(short("vq-digits"), tmp_path_factory.mktemp("cuda") / "vq", device=CUDA)


def short(name: str, **training: Any) -> Experiment:
    run = RECIPES[name]()
    network = NETWORK if isinstance(run.network, SongUNetConfig) else run.network
    changes = {"batch": 16, "micro_batch": None, "total_images": 32, "log_images": 16} | training
    return replace(run, network=network, training=replace(run.training, **changes))


def trainer(experiment: Experiment, folder: Path, device: torch.device = CUDA) -> Trainer:
    made, training = assemble(experiment), experiment.training
    loader = Loader(made.images, training.batch, training.seed)
    folder.mkdir(exist_ok=True, parents=True)
    log = Log(folder)
    return Trainer(experiment.method, made.parts, loader, training, folder / "checkpoints", log=log, device=device)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_and_resuming(precision: Any, tmp_path: Path) -> None:
    """Two halves end with the bits of one whole, as deterministic kernels are asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = run_experiment(short("edm-digits", precision=precision, total_images=64), tmp_path / "w", device=CUDA)
        half = short("edm-digits", precision=precision, total_images=64, checkpoint_images=32)
        first = trainer(half, tmp_path / "h")
        for _ in range(2):
            first.train_step()
        first.save()
        second = trainer(half, tmp_path / "h")
        assert second.resume()
        second.train()
    finally:
        torch.use_deterministic_algorithms(False)
    ended = find_model(whole).model.state_dict()
    for name, value in second.product_state().items():
        torch.testing.assert_close(value.cpu(), ended[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family(name: str, teacher: Path, tokenizer: Path, tmp_path: Path) -> None:
    experiment = short(name, total_images=8192)
    given = {"teacher": str(teacher), "tokenizer": str(tokenizer)}
    experiment = replace(experiment, start=str(teacher) if experiment.start else None)
    experiment = experiment.giving(**{k: v for k, v in given.items() if k in experiment.given})
    t = trainer(experiment, tmp_path)
    for _ in range(2):
        t.train_step()
    t.watch.look()
    assert all(np.isfinite(loss) for loss in t.watch.losses.values())


@pytest.mark.parametrize("name", ["edm-digits", "cd-digits", "trigflow-digits", "md4-digits"])
def test_losses_are_the_cpu_s(name: str, teacher: Path, tmp_path: Path) -> None:
    """Of the fourth step: the same pictures, classes, noise and dropout, up to rounding."""
    found = []
    for device in (CUDA, torch.device("cpu")):
        experiment = short(name, total_images=64, log_images=64, tf32=False)
        experiment = experiment.giving(**{k: str(teacher) for k in experiment.given if k == "teacher"})
        t = trainer(experiment, tmp_path / device.type, device)
        t.train()
        found.append(t.watch.losses[t.method.product])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_batches_are_the_cpu_s() -> None:
    """Asked for one after the other, as fast as the host can."""
    images = open_images("digits")
    there, here = (Loader(images, 64, 0) for _ in "ab")
    there.follow(Turns(stride=64, first=0, count=1, size=64), CUDA)
    batches = [there.batch(64 * k) for k in range(20)]
    for k, batch in enumerate(batches):
        assert batch.images.is_cuda and torch.equal(batch.images.cpu(), here.batch(64 * k).images), f"batch {k}"


@pytest.mark.parametrize("name", ["edm-digits", "scd-digits", "dmd2-digits", "cd-digits"])
def test_no_step_waits_for_the_device(name: str, teacher: Path, tmp_path: Path) -> None:
    """Between two lines of the log; of RAdam the first five steps do, in which it cannot be told to stand still."""
    experiment = short(name, precision="bf16", log_images=160, total_images=320)
    experiment = experiment.giving(**{k: str(teacher) for k in experiment.given if k == "teacher"})
    t = trainer(experiment, tmp_path)
    for _ in range(6):
        t.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            t.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["edm-digits", "cd-digits", "trigflow-digits"])
def test_a_recorded_step_is_the_plain_one(name: str, teacher: Path, tmp_path: Path) -> None:
    """To the rounding of sums whose order a GPU leaves open; noise and dropout are the same."""
    ends = []
    for graphs in (False, True):
        experiment = short(name, graphs=graphs, total_images=128, log_images=64)
        experiment = experiment.giving(**{k: str(teacher) for k in experiment.given if k == "teacher"})
        t = trainer(experiment, tmp_path / str(graphs))
        t.train()
        assert not graphs or (t.graphs is not None and t.graphs.ready), t.graphs and t.graphs.why_not
        ends.append((t.watch.losses[t.method.product], t.product_state()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-2, atol=1e-4)


def test_a_recording_that_breaks_harms_nothing() -> None:
    """Neither torch's generator, nor the current stream, nor the next recording."""
    x, stream, before = torch.zeros(2, device=CUDA), torch.cuda.current_stream(), torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError):
        record(lambda: x.add_(x[0].item()), CUDA)  # which waits, and may not
    assert torch.cuda.current_stream() == stream and torch.equal(torch.cuda.get_rng_state(), before)
    torch.randn(3, device=CUDA)
    again = record(lambda: x.add_(1), CUDA)
    start = x.clone()
    again()
    assert torch.equal(x, start + 1)
    torch.randn(3, device=CUDA)


def test_what_the_host_sends_is_not_recorded() -> None:
    """The address would be recorded, and PyTorch says nothing where nobody waits."""
    there, here = torch.zeros(3, device=CUDA), torch.ones(3)
    for work in (lambda: there.copy_(here, non_blocking=True), lambda: there.add_(here.to(CUDA, non_blocking=True))):
        with pytest.raises(RuntimeError, match="numbers travel between the host and the device"):
            record(work, CUDA)


def test_a_pass_is_recorded_once_nothing_keeps_an_earlier_one() -> None:
    """Whose nodes would be on the stream of that step."""
    layer, x = torch.nn.Linear(4, 4).to(CUDA), torch.randn(2, 4, device=CUDA)

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).square().sum().backward()

    loss = layer(x).sum()
    loss.backward()
    assert kept(list(layer.parameters()))
    del loss
    assert not kept(list(layer.parameters()))
    record(work, CUDA)()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_a_bad_number_stops_the_run_and_moves_nothing(tmp_path: Path) -> None:
    t = trainer(short("edm-digits", total_images=160, log_images=64), tmp_path)
    t.train_step()
    before = {k: v.clone() for k, v in t.learners["denoiser"].module.state_dict().items()}
    honest, calls = type(t)._backward, []

    def spoiled(self: Trainer, update: Any, **rest: Any) -> None:
        calls.append(None)
        honest(self, replace(update, loss=update.loss * float("nan")) if len(calls) == 1 else update, **rest)

    t._backward = spoiled.__get__(t)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"step 1 \(16 images\): the gradient of part 'denoiser' is not finite"):
        t.train()
    after = t.learners["denoiser"].module.state_dict()
    assert t.step_index == 4 and all(torch.equal(before[k], after[k]) for k in before)


def test_noise_is_the_cpu_s() -> None:
    """Up to the rounding of logarithm and cosine; dropout's kernel to the last bit."""
    there, here = (BatchNoise(3, 5, range(4, 8), 16, device) for device in (CUDA, torch.device("cpu")))
    like = torch.empty(4, 3, 8, 8)
    torch.testing.assert_close(there.normal(like.to(CUDA)).cpu(), here.normal(like), rtol=1e-5, atol=1e-6)
    assert torch.equal(there.uniform(like.to(CUDA)).cpu(), here.uniform(like))
    assert torch.equal(there.kept(like.to(CUDA), 0.3).cpu(), here.kept(like, 0.3))
    assert noise_module._drops_the_same(CUDA), "dropout's kernel is not used"


@pytest.mark.parametrize("shape", [(3, 192, 64, 64), (2, 48, 5, 7), (2, 768, 8, 8)])
@pytest.mark.parametrize("told", [False, True])
def test_the_kernels_of_group_norm_are_pytorch_s_operations(shape: tuple[int, ...], told: bool) -> None:
    """Values and gradients in bf16 against float32; what they answer lies channels last."""
    torch.manual_seed(0)
    channels = shape[1]
    x = (torch.randn(shape, device=CUDA) + 0.5).bfloat16().contiguous(memory_format=torch.channels_last)
    assert fused.activates(x)
    learned = [torch.randn(channels, device=CUDA) for _ in range(2)]
    scale, shift = torch.randn(2, shape[0], channels, 1, 1, device=CUDA).bfloat16() if told else (None, None)
    dy, answers = torch.randn(shape, device=CUDA).bfloat16(), []
    for function, dtype in ((fused.activated, torch.bfloat16), (fused.plain, torch.float32)):
        given = [x.to(dtype), *learned, *(t.to(dtype) for t in (scale, shift) if t is not None)]
        given = [t.detach().requires_grad_() for t in given]
        y = function(given[0], 12, given[1], given[2], 1e-5, *given[3:], silu=True)
        answers.append((y, *torch.autograd.grad(y, given, dy.to(dtype))))
    assert answers[0][0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(*answers, strict=True):
        assert torch.linalg.vector_norm(a.float() - b.float()) < 0.01 * torch.linalg.vector_norm(b.float())


def test_samples_are_the_cpu_s() -> None:
    images = [
        load("emoji64-32", Heun(num_steps=4), device).generate(4, labels=1).astype(int) for device in ("cpu", CUDA)
    ]
    assert np.abs(images[0] - images[1]).mean() < 0.5


def test_samples_do_not_round_whatever_torch_is_told() -> None:
    images = []
    for allowed in (False, True):
        with tf32(allowed):
            images.append(load("emoji64-32", Heun(num_steps=4), CUDA).generate(4, labels=1))
    assert np.array_equal(*images)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_gpu_draws_what_the_first_does(precision: Any) -> None:
    """It is not the process's current one: neither events nor Triton's launches may be the first's."""
    file = find_model("emoji64-32")
    images = [
        ImageGenerator(file.model, file.spec, Heun(num_steps=4), torch.device("cuda", k), precision=precision).generate(
            32, labels=1, batch_size=8
        )
        for k in (0, 1)
    ]
    assert torch.cuda.current_device() == 0 and np.array_equal(*images)


def one_step(channels: int = 32) -> tuple[ImageGenerator, ConsistencyModel]:
    """A generator that records nothing of its own accord."""
    config = DhariwalUNetConfig(img_resolution=16, in_channels=3, out_channels=3, label_dim=4, model_channels=channels,
                                channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))  # fmt: skip
    model = ConsistencyModel(DhariwalUNet(config))
    torch.nn.init.normal_(model.network.out_conv.weight)
    spec = DataSpec(name="x", resolution=16, channels=3, num_classes=4)
    return ImageGenerator(model, spec, MultistepConsistency(sigmas=(1.0,)), CUDA, graphs=False), model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    from imagewright.samplers import replay

    class Counted(replay._Recorded):
        def __init__(self, *args: Any) -> None:
            made.append(None)
            super().__init__(*args)

    monkeypatch.setattr(replay, "_Recorded", Counted)
    return made


@pytest.mark.parametrize("half", [False, True])
def test_replayed_calls_are_the_plain_ones(half: bool, recorded: list[Any]) -> None:
    generator, model = one_step()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        plain = generator.generate(12, labels=[0, 1, 2, -1] * 3, batch_size=4)
        with Replays(model):
            assert isinstance(model.network.forward, Replay)
            again = generator.generate(12, labels=[0, 1, 2, -1] * 3, batch_size=4)
    assert np.array_equal(plain, again) and len(recorded) == 1
    assert not isinstance(model.network.forward, Replay)


def test_a_compiled_step_is_the_plain_one_up_to_rounding(tmp_path: Path) -> None:
    ends = []
    for compiled in (False, True):
        run = short("edm-digits", compile=compiled, total_images=32)
        t = trainer(replace(run, network=replace(NETWORK, dropout=0.0)), tmp_path / str(compiled))
        t.train()
        ends.append(t.watch.losses["denoiser"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_derivatives_of_a_compiled_network_are_those_of_the_plain_one() -> None:
    """Blocks are not asked as they were compiled, which have none."""
    network = SongUNet(replace(NETWORK, dropout=0.0)).to(CUDA)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    at, along = ((torch.randn(2, 1, 8, 8, device=CUDA), torch.rand(2, device=CUDA)) for _ in "ab")
    expected = derivative(network.forward, at, along)
    compile_network(network)
    network(*at)
    for found, wanted in zip(derivative(network.forward, at, along), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert expected[1].abs().max() > 0


def test_labels_on_the_device_are_not_looked_at(tmp_path: Path) -> None:
    generator, model = one_step()
    x, cond = torch.randn(2, 3, 16, 16, device=CUDA), Condition(label=torch.tensor([0, -1], device=CUDA))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, torch.ones(2, device=CUDA), torch.zeros(2, device=CUDA), cond)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert generator.nfe == 2
