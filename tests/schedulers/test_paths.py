import math

import pytest
import torch

from maetok_hf.schedulers import PATHS, path_coefficients


TIMES = torch.linspace(0, 1, 33, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_starts_at_the_data_and_ends_at_the_noise(path):
    alpha, sigma, _, _ = path_coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_the_coefficients(path):
    ones = torch.ones_like(TIMES)
    for index in (0, 1):
        _, derivative = torch.func.jvp(lambda t, index=index: path_coefficients(t, path)[index], (TIMES,), (ones,))
        torch.testing.assert_close(derivative, path_coefficients(TIMES, path)[2 + index])


def test_the_cosine_path_keeps_unit_variance():
    alpha, sigma, _, sigma_derivative = path_coefficients(TIMES, "cosine")
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(TIMES))
    assert sigma_derivative[0].item() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_those_of_the_times(path, dtype):
    for coefficient in path_coefficients(torch.rand(2, 1, 1).to(dtype), path):
        assert coefficient.shape == (2, 1, 1) and coefficient.dtype == dtype


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="`path` must be one of 'linear', 'cosine', got 'vp'"):
        path_coefficients(TIMES, "vp")
