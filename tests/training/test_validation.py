"""PSNR of known errors."""

import math

import pytest
import torch

from maetok_hf.training.validation import peak_signal_to_noise_ratio


def test_psnr_of_a_known_error_is_relative_to_the_range_of_two():
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = images.clone()
    reconstructions[0] += 0.2
    reconstructions[1] += 0.5
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 0.25)]
    torch.testing.assert_close(
        peak_signal_to_noise_ratio(reconstructions, images),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


def test_overshoot_beyond_the_range_of_images_does_not_count():
    images = torch.ones(1, 3, 4, 4)
    images[..., 0] = 0
    reconstructions = images.clone()
    reconstructions[..., 0] = 0.1
    overshoot = torch.where(images == 1, 3.0, reconstructions)
    assert torch.equal(
        peak_signal_to_noise_ratio(overshoot, images), peak_signal_to_noise_ratio(reconstructions, images)
    )


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) but `images` has \(1, 3, 8, 8\)"):
        peak_signal_to_noise_ratio(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))
