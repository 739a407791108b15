"""The Inception network of FID: names and shapes of its weight file, its resize by hand, finding weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imagewright.metrics.inception import (
    WEIGHTS_SHA256,
    Block,
    InceptionFeatures,
    InceptionV3,
    _pool,
    load_network,
    locate_weights,
    preprocess,
    resize_bilinear_tf1,
)
from imagewright.types import UserError


def resized(values: list[float], size: int) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)
    return resize_bilinear_tf1(x, (1, size)).flatten().tolist()


def test_resize_by_hand() -> None:
    assert resized([0, 10], 4) == [0, 5, 10, 10]  # positions 0, 0.5, 1, 1.5; the last pixel repeats
    assert resized([0, 4, 8, 12], 2) == [0, 8]  # positions 0, 2: no averaging on the way down
    assert resized([1, 2, 3], 3) == [1, 2, 3]
    assert resized([6], 3) == [6, 6, 6]
    assert resized([0, 3, 9], 2) == [0, 6]  # positions 0, 1.5


def test_resize_is_separable_in_height_and_width() -> None:
    x = torch.tensor([[0.0, 10.0], [20.0, 40.0]], dtype=torch.float64).view(1, 1, 2, 2)
    got = resize_bilinear_tf1(x, (4, 4))[0, 0]
    torch.testing.assert_close(got[:2, :2], torch.tensor([[0, 5], [10, 17.5]], dtype=torch.float64))
    torch.testing.assert_close(got[2:, 2:], torch.full((2, 2), 40.0, dtype=torch.float64))


def test_preprocess_range() -> None:
    images = np.stack([np.zeros((2, 2, 1), np.uint8), np.full((2, 2, 1), 128, np.uint8)])
    x = preprocess(images, torch.float32, torch.device("cpu"))
    assert x.shape == (2, 3, 299, 299)
    assert (x[0] == -1).all()
    assert (x[1] == 0).all()


def test_average_pooling_leaves_out_the_padding_and_the_last_block_takes_the_maximum() -> None:
    ones = torch.ones(1, 1, 3, 3)
    assert (_pool(ones, "avg") == 1).all()
    corner = torch.zeros(1, 1, 3, 3)
    corner[..., 0, 0] = 8
    assert _pool(corner, "avg")[0, 0, 0, 0] == 2  # over the 4 pixels that exist
    assert _pool(corner, "max")[0, 0, 1, 1] == 8
    network = shaped()
    pools = [branch.pool for name in ("Mixed_7b", "Mixed_7c") for branch in network.get_submodule(name).branches]
    assert pools == ["", "", "", "avg", "", "", "", "max"]


def shaped() -> InceptionV3:
    """The network without memory behind its weights."""
    with torch.device("meta"):
        return InceptionV3()


def test_names_and_shapes_of_the_public_file() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in shaped().state_dict().items()}
    assert len(state) == 94 * 6 + 2  # convolution and five of its normalisation; the linear layer
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch1x1.bn.running_mean": (64,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3dbl_1.conv.weight": (64, 288, 1, 1),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: state.get(name) for name in expected} == expected


def test_shapes_inside() -> None:
    """Channels and sizes of the paper's grids, followed without arithmetic."""
    network, seen = shaped(), {}
    for name, block in network.named_children():
        if isinstance(block, Block):
            block.register_forward_hook(lambda m, i, o, name=name: seen.update({name: tuple(o.shape[1:])}))
    features, logits = network.eval()(torch.empty(2, 3, 299, 299, device="meta"))
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    assert (seen["Mixed_5d"], seen["Mixed_6a"]) == ((288, 35, 35), (768, 17, 17))
    assert (seen["Mixed_7a"], seen["Mixed_7c"]) == ((1280, 8, 8), (2048, 8, 8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), path)
    return path


def test_extractor_with_random_weights(weights) -> None:
    extractor = InceptionFeatures(weights, batch_size=1)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert (features[0] != features[1]).any()
    np.testing.assert_allclose(logits, features @ extractor.encoder.network.fc.weight.numpy().T, rtol=1e-3, atol=1e-5)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (extractor.sha256, extractor.official, extractor.name) == (
        digest,
        False,
        f"inception-{digest[:8]}",
    )


def test_weights_without_batch_counters_or_as_safetensors(weights, tmp_path) -> None:
    network = load_network(weights)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "a.safetensors")
    back = load_network(tmp_path / "a.safetensors")
    torch.testing.assert_close(back.fc.weight, network.fc.weight, rtol=0, atol=0)


def test_other_weights_are_refused(tmp_path) -> None:
    save_file({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold the FID Inception weights"):
        load_network(tmp_path / "a.safetensors")


def test_a_missing_file_says_how_to_get_it(tmp_path) -> None:
    with pytest.raises(UserError, match=f"curl -L -o .*6726825d.pth .sha256 {WEIGHTS_SHA256}"):
        locate_weights(tmp_path / "pt_inception-2015-12-05-6726825d.pth")


def test_checksums(tmp_path) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    for name in ("free.pth", f"carried-{digest[:8]}.pth"):
        (tmp_path / name).write_bytes(content)
        assert locate_weights(tmp_path / name) == tmp_path / name
    assert locate_weights(tmp_path / "free.pth", expected_sha256=digest) == tmp_path / "free.pth"
    (tmp_path / "wrong-00000000.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"has sha256 {digest}, expected 00000000"):
        locate_weights(tmp_path / "wrong-00000000.pth")
    with pytest.raises(UserError, match="expected ffff"):
        locate_weights(tmp_path / "free.pth", expected_sha256="ffff")


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path != "/missing.pth" else 404)
            self.end_headers()
            self.wfile.write(b"weights")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_url_is_fetched_once_and_verified(server, tmp_path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    path = locate_weights(f"{server}/a.pth", cache=tmp_path, expected_sha256=digest)
    assert path.read_bytes() == b"weights"
    assert locate_weights("http://unreachable.invalid/a.pth", cache=tmp_path) == path
    with pytest.raises(UserError, match="delivered sha256"):
        locate_weights(f"{server}/b-00000000.pth", cache=tmp_path)
    with pytest.raises(UserError, match="cannot be fetched"):
        locate_weights(f"{server}/missing.pth", cache=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
