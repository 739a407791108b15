"""Augmentation: single operations against torch's own, the warp against known geometry, labels, no leaks."""

import math

import pytest
import torch

from imagewright.data.augment import LABEL_WIDTHS, SYM6, Augment, warp
from imagewright.noise import ImageNoise, StepNoise
from imagewright.types import UserError

OFF = dict.fromkeys(LABEL_WIDTHS, 0.0)


def only(**on):
    """An augmentation with these operations alone, always."""
    return Augment(p=1.0, **{**OFF, **on})


def images(n=6, channels=3, size=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, channels, size, size, dtype=dtype, generator=generator) - 1


def smooth(x, y):
    """A picture of two blobs, known at every point: x, y in pixels from the centre of 32."""
    x, y = x / 32, y / 32
    upright = torch.exp(-((x + 0.15) ** 2 + 0.5 * y**2) / 0.02)
    return upright - 0.5 * torch.exp(-(x**2 + (y - 0.1) ** 2) / 0.03)


def render(value, size):
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return value(at[None, :].expand(size, size), at[:, None].expand(size, size))[None, None]


def matrix(a, b, c, d, x=0.0, y=0.0):
    return torch.tensor([[[a, b, x], [c, d, y], [0, 0, 1]]], dtype=torch.float64)


class Fixed:
    """Draws that are told: the values in order, the same for each image."""

    def __init__(self, *values):
        self.values = list(values)

    def normal(self, like):
        value = torch.as_tensor(self.values.pop(0), dtype=like.dtype)
        return value.expand(like.shape).clone()

    uniform = normal


# --- warp ---------------------------------------------------------------------------------------------------


def test_filter_is_orthonormal_with_six_vanishing_moments():
    h = torch.tensor(SYM6, dtype=torch.float64)
    for shift in range(0, 12, 2):
        assert float(h[shift:] @ h[: 12 - shift]) == pytest.approx(float(shift == 0), abs=1e-13)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    for moment in range(6):
        k = (torch.arange(12, dtype=torch.float64) / 11) ** moment
        assert float((signs * k) @ h) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_identity_gives_the_images_back(size, channels):
    x = images(2, channels, size)
    got = warp(x, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


def test_whole_pixel_shift_is_a_shift_with_reflection():
    x = images(1, size=16)
    got = warp(x, matrix(1, 0, 0, 1, -3, 2))  # it reads 3 to the left and 2 below: content goes right and up
    index_x = torch.tensor([abs(i - 3) for i in range(16)])
    index_y = torch.tensor([15 - abs(15 - (i + 2)) for i in range(16)])
    torch.testing.assert_close(got, x[:, :, index_y][:, :, :, index_x], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[:, :, :-2, 3:], x[:, :, 2:, :-3], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "inverse",
    [
        matrix(0, -1, 1, 0),
        matrix(math.cos(0.4), -math.sin(0.4), math.sin(0.4), math.cos(0.4)),
        matrix(0.8, 0, 0, 0.8),
        matrix(1.2, 0, 0, 0.9),
        matrix(1, 0, 0, 1, 2.3, -1.7),
    ],
    ids=["quarter turn", "turn", "grow", "stretch", "shift"],
)
def test_warp_moves_a_smooth_picture_where_it_should_be(inverse):
    got = warp(render(smooth, 32), inverse)
    (a, b, x), (c, d, y), _ = inverse[0].tolist()
    want = render(lambda u, v: smooth(a * u + b * v + x, c * u + d * v + y), 32)
    inside = (..., slice(6, -6), slice(6, -6))
    assert (got - want)[inside].abs().max() < 0.03
    assert (render(smooth, 32) - want)[inside].abs().max() > 0.1  # not by standing still


def test_warps_compose_and_invert():
    picture = render(smooth, 32)
    turn = matrix(math.cos(0.5), -math.sin(0.5), math.sin(0.5), math.cos(0.5))
    shift = matrix(1, 0, 0, 1, 1.5, 0.5)
    inside = (..., slice(8, -8), slice(8, -8))
    twice, once = warp(warp(picture, turn), shift), warp(picture, turn @ shift)
    assert (twice - once)[inside].abs().max() < 0.03
    back = warp(warp(picture, turn), torch.linalg.inv(turn))
    assert (back - picture)[inside].abs().max() < 0.03


def test_a_constant_stays_constant_as_far_as_reflection_reaches():
    x = torch.full((1, 1, 16, 16), 0.7, dtype=torch.float64)
    for inverse in (matrix(1, 0, 0, 1, 5.3, -4.1), matrix(0.6, -0.8, 0.8, 0.6), matrix(1.4, 0, 0, 1.4)):
        torch.testing.assert_close(warp(x, inverse), x, rtol=0, atol=0.01)


def test_an_image_does_not_depend_on_its_batch():
    x = images(2)
    far = matrix(1, 0, 0, 1, 9.5, 4.0)
    near = matrix(math.cos(0.1), -math.sin(0.1), math.sin(0.1), math.cos(0.1))
    together = warp(x, torch.cat([near, far]))
    torch.testing.assert_close(together[:1], warp(x[:1], near), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[1:], warp(x[1:], far), rtol=0, atol=1e-12)


# --- operations and their labels ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "axis"), [("xflip", 3), ("yflip", 2)])
def test_flip_is_torch_flip(name, axis):
    x = images(64)
    out, labels = only(**{name: 1.0})(x, StepNoise(1))
    assert set(labels[:, 0].tolist()) == {0.0, 1.0}
    for picture, before, (flipped,) in zip(out, x, labels.tolist(), strict=True):
        assert torch.equal(picture, before.flip(axis - 1) if flipped else before)


@pytest.mark.parametrize(("turns", "label"), [(0, [0, 0]), (1, [1, 0]), (2, [1, 1]), (3, [0, 1])])
def test_quarter_turns_are_torch_rot90(turns, label):
    x = images()
    out, labels = only(rotate_int=1.0)(x, Fixed((turns + 0.5) / 4, 0.0))
    assert torch.equal(out, x.rot90(turns, (2, 3)))
    assert labels.tolist() == [label] * 6


def test_whole_pixel_translation_goes_right_and_up():
    x = images(1, size=16)
    out, labels = only(translate_int=1.0, translate_int_max=0.25)(x, Fixed([[1.0, 0.75]], 0.0))
    torch.testing.assert_close(labels, torch.tensor([[1.0, 0.5]]))
    assert torch.equal(out[:, :, :-2, 4:], x[:, :, 2:, :-4])
    assert torch.equal(out[:, :, :-2, :4], x[:, :, 2:, 1:5].flip(3))  # reflected, the edge pixel not repeated
    assert torch.equal(out[:, :, -2:, 4:], x[:, :, -3:-1, :-4].flip(2))


def test_scale_grows_by_a_power_of_two():
    out, labels = only(scale=1.0, scale_std=0.5)(render(smooth, 32), Fixed(1.0, 0.0))
    torch.testing.assert_close(labels, torch.tensor([[1.0]]))
    want = render(lambda x, y: smooth(x / 2**0.5, y / 2**0.5), 32)
    assert (out - want)[..., 4:-4, 4:-4].abs().max() < 0.03


def test_fractional_rotation_is_counter_clockwise():
    picture = render(smooth, 32)
    out, labels = only(rotate_frac=1.0)(picture, Fixed(0.75, 0.0))  # 2 * 0.75 - 1 = half of half a turn
    torch.testing.assert_close(labels, torch.tensor([[-1.0, 1.0]]), rtol=0, atol=1e-6)
    assert (out - picture.rot90(1, (2, 3)))[..., 4:-4, 4:-4].abs().max() < 0.03


def test_anisotropic_scaling_along_its_direction():
    out, labels = only(aniso=1.0, aniso_std=0.3)(render(smooth, 32), Fixed(1.0, 0.9, 0.0, 0.9))  # not turned
    torch.testing.assert_close(labels, torch.tensor([[1.0, 0.0]]))
    want = render(lambda x, y: smooth(x / 2**0.3, y * 2**0.3), 32)
    assert (out - want)[..., 6:-6, 6:-6].abs().max() < 0.03
    out, labels = only(aniso=1.0, aniso_std=0.3)(render(smooth, 32), Fixed(1.0, 0.75, 0.0, 0.1))  # straight up
    torch.testing.assert_close(labels, torch.tensor([[0.0, 1.0]]), rtol=0, atol=1e-6)
    want = render(lambda x, y: smooth(x * 2**0.3, y / 2**0.3), 32)
    assert (out - want)[..., 6:-6, 6:-6].abs().max() < 0.03


def test_fractional_translation_goes_right_and_down():
    x = images(1, size=16)
    out, labels = only(translate_frac=1.0)(x, Fixed([[1.5, 0.5]], 0.0))  # in eighths of 16 pixels
    torch.testing.assert_close(labels, torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(out[:, :, 1:, 3:], x[:, :, :-1, :-3], rtol=0, atol=1e-12)


# --- the whole ----------------------------------------------------------------------------------------------


def test_edms_labels_have_nine_numbers_in_its_order():
    augment = Augment()
    assert augment.augment_dim == 9
    _, labels = augment(images(512, 1, 8), StepNoise(2))
    assert labels.shape == (512, 9)
    assert labels.dtype == torch.float32
    xflip, yflip, scale, turn, aniso, shift = labels.split([1, 1, 1, 2, 2, 2], dim=1)
    assert set(xflip.unique().tolist()) == set(yflip.unique().tolist()) == {0.0, 1.0}
    assert float(xflip.mean()) == pytest.approx(0.5, abs=0.08)
    assert float(yflip.mean()) == pytest.approx(0.06, abs=0.04)
    for part in (scale, turn, aniso, shift):
        on = (part != 0).any(1)
        assert float(on.float().mean()) == pytest.approx(0.12, abs=0.05)
    torch.testing.assert_close((turn[:, 0] + 1) ** 2 + turn[:, 1] ** 2, torch.ones(512))
    assert (turn[:, 0] <= 0).all()
    assert scale.abs().max() < 6


@pytest.mark.parametrize("operations", [dict.fromkeys(LABEL_WIDTHS, 1.0), {"aniso": 1.0}, {}], ids=len)
def test_augment_dim_is_the_labels_width(operations):
    augment = only(**operations)
    _, labels = augment(images(), StepNoise(0))
    assert labels.shape == (6, augment.augment_dim)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (4, 64)])
def test_images_without_a_label_are_untouched(channels, size):
    x = images(64, channels, size, dtype=torch.float32)
    out, labels = Augment(rotate_int=1.0, translate_int=1.0)(x, StepNoise(3))
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    still = (labels == 0).all(1)
    assert 0 < still.sum() < 64
    assert torch.equal(out[still], x[still])
    assert all(not torch.equal(a, b) for a, b in zip(out[~still], x[~still], strict=True))


def test_p_zero_does_nothing():
    x = images()
    out, labels = Augment(p=0.0)(x, StepNoise(0))
    assert torch.equal(out, x)
    assert torch.equal(labels, torch.zeros(6, 9))


def test_the_input_is_left_alone():
    x = images()
    before = x.clone()
    only(scale=1.0, xflip=1.0)(x, StepNoise(0))
    assert torch.equal(x, before)


def test_equal_noise_gives_equal_images():
    x = images(16)
    first, second, other = (Augment()(x, StepNoise(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_an_images_draws_are_its_own():
    x = images(8, dtype=torch.float32)
    augment = Augment(p=0.5, rotate_int=1.0, translate_int=1.0)
    out, labels = augment(x, ImageNoise(7, range(8)))
    alone, label = augment(x[5:6], ImageNoise(7, [5]))
    assert torch.equal(labels[5:6], label)
    torch.testing.assert_close(out[5:6], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"p": 1.5}, r"Augment\.p must be in \[0, 1\], got 1\.5"),
        ({"scale": -1.0}, r"Augment\.scale must be >= 0 and finite, got -1\.0"),
        ({"xflip": math.inf}, r"Augment\.xflip must be >= 0 and finite"),
        ({"aniso_rotate_prob": 2.0}, r"Augment\.aniso_rotate_prob must be in"),
    ],
)
def test_nonsense_is_refused(setting, told):
    with pytest.raises(UserError, match=told):
        Augment(**setting)


def test_unsuitable_images_are_refused():
    with pytest.raises(ValueError, match=r"floating-point images, got torch\.uint8"):
        Augment()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), StepNoise(0))
    with pytest.raises(ValueError, match="square images, got 8x16"):
        only(rotate_int=1.0)(torch.zeros(1, 3, 8, 16), StepNoise(0))
