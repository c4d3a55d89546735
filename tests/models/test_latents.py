"""The one place where latents are normalised."""

import pytest
import torch

from maetok_hf import denormalize_latents, normalize_latents
from tests.testing_utils import seeded_normal, tiny_autoencoder


@pytest.mark.parametrize(
    "mean, std", [(0.5, 2.0), (1, 3), ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]), (0.5, [2.0] * 4)]
)
def test_normalisation_matches_the_formula_and_is_inverted(mean, std):
    config, latents = {"latents_mean": mean, "latents_std": std}, seeded_normal(2, 6, 4)
    normalized = normalize_latents(latents, config)
    expected = (latents - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(normalized, expected)
    torch.testing.assert_close(denormalize_latents(normalized, config), latents)


def test_a_models_config_is_taken():
    model, latents = tiny_autoencoder(), seeded_normal(2, 6, 4)
    torch.testing.assert_close(normalize_latents(latents, model.config), (latents - 0.1) / 1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    latents = seeded_normal(2, 6, 4, dtype=dtype)
    for function in (normalize_latents, denormalize_latents):
        assert function(latents, {"latents_mean": 0.1, "latents_std": [1.0, 2.0, 3.0, 4.0]}).dtype == dtype


@pytest.mark.parametrize("function", [normalize_latents, denormalize_latents])
def test_missing_statistics_are_an_error(function):
    for config, missing in (
        ({}, ["latents_mean", "latents_std"]),
        ({"latents_mean": 0.0, "latents_std": None}, ["latents_std"]),
        (tiny_autoencoder(latents_mean=None, latents_std=None).config, ["latents_mean", "latents_std"]),
    ):
        with pytest.raises(ValueError, match=" and no ".join(f"`{name}`" for name in missing)):
            function(torch.zeros(1, 6, 4), config)


@pytest.mark.parametrize("function", [normalize_latents, denormalize_latents])
def test_statistics_of_the_wrong_length_are_an_error(function):
    with pytest.raises(ValueError, match=r"`latents_std`.*channel \(4\).*\(6,\)"):
        function(torch.zeros(1, 6, 4), {"latents_mean": 0.0, "latents_std": [1.0] * 6})


def test_encoding_and_decoding_stay_raw():
    """The statistics of the config change neither `encode` nor `decode`."""
    sample, latent = seeded_normal(2, 3, 32, 32), seeded_normal(2, 6, 4)
    models = [tiny_autoencoder(), tiny_autoencoder(latents_mean=None, latents_std=None)]
    with torch.no_grad():
        assert torch.equal(*(model.encode(sample).latent for model in models))
        assert torch.equal(*(model.decode(latent).sample for model in models))
