"""8-bit pixels by the two roundings of the field."""

import pytest
import torch

from maetok_hf.sampling import to_uint8


def values(*numbers):
    return torch.tensor(numbers).reshape(1, 1, 1, -1)


def test_each_rounding_is_its_formula():
    # 127.5 x + 127.5 is 100.4, 100.6, and the ends, of which some lie outside
    x = values(100.4 / 127.5 - 1, 100.6 / 127.5 - 1, -1.0, 1.0, -3.0, 3.0)
    assert to_uint8(x, "nearest")[0, 0, :, 0].tolist() == [100, 101, 0, 255, 0, 255]
    assert to_uint8(x, "truncate")[0, 0, :, 0].tolist() == [100, 100, 0, 255, 0, 255]


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_eight_bit_images_survive(rounding):
    levels = torch.arange(256, dtype=torch.float64)
    images = (levels / 127.5 - 1).float().reshape(1, 1, 16, 16)
    error = to_uint8(images, rounding)[0, :, :, 0].flatten() - levels
    # in float32 a level may come out just below itself, and truncation takes it for the one before
    assert error.abs().max() <= (0 if rounding == "nearest" else 1)


def test_truncation_is_half_a_level_darker_on_average():
    x = torch.linspace(-0.9, 0.9, 99_999).reshape(1, 1, 1, -1)
    difference = to_uint8(x, "nearest").double().mean() - to_uint8(x, "truncate").double().mean()
    assert difference == pytest.approx(0.5, abs=0.01)


def test_layout_is_rows_columns_colors_and_one_channel_becomes_grey():
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[0, 0, 0].tolist() == [0, 128, 255]
    assert to_uint8(images[:, 2:]).shape == (2, 4, 5, 3)


def test_unknown_rounding_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="`rounding` must be one of 'nearest', 'truncate', got 'up'"):
        to_uint8(values(0.0), "up")
    with pytest.raises(FloatingPointError, match="not finite"):
        to_uint8(values(float("nan")))
