"""Reconstructions of any autoencoder as 8-bit images, and scores that other implementations give, too."""

import math

import pytest
import torch
from diffusers import AutoencoderRAE, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from maetok_hf.evaluation import FeatureCollector
from maetok_hf.evaluation.reconstruction import (
    ReconstructionProtocol,
    TokenizerFeatures,
    reconstruct,
)
from maetok_hf.training.validation import ReconstructionMetrics
from tests.evaluation.networks import TinyExtractor, random_images
from tests.testing_utils import tiny_autoencoder
from tests.training.test_latent_encoding import TOKENIZERS


class ShiftingAutoencoder(ModelMixin, ConfigMixin):
    """Its latents are the pixels, and it makes all of them brighter by some levels of 8 bits."""

    @register_to_config
    def __init__(self, levels: float = 0.0):
        super().__init__()
        self.brightness = torch.nn.Parameter(torch.tensor(levels))

    def encode(self, sample, return_dict=True):
        return (sample,)

    def decode(self, latent, return_dict=True):
        return (latent + self.brightness / 127.5,)


def absolute_error(reconstructions, images):
    """Stands for a perceptual distance."""
    return (reconstructions - images).abs().flatten(1).mean(dim=1)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TOKENIZERS[request.param][0]().eval()


@torch.no_grad()
def test_every_tokenizer_reconstructs_in_its_own_range(tokenizer):
    images = random_images(3, size=16)
    fractions = images.double() / 255
    if isinstance(tokenizer, AutoencoderRAE):
        expected = tokenizer(fractions.float()).sample
    else:
        expected = (tokenizer((2 * fractions - 1).float()).sample + 1) / 2
    found = reconstruct(tokenizer, images)
    assert found.dtype == torch.uint8 and found.shape == images.shape and found.is_contiguous()
    assert (found.double() - (255 * expected).clamp(0, 255)).abs().max() <= 0.5 + 1e-3
    assert found.float().std() > 1


def test_other_resolutions_are_reconstructed_at_their_own_size():
    tokenizer, images = tiny_autoencoder(sample_size=16), random_images(2, size=32)
    assert reconstruct(tokenizer, images).shape == (2, 3, 32, 32)


def test_a_tokenizer_that_changes_the_size_is_refused():
    class Doubling(ShiftingAutoencoder):
        def decode(self, latent, return_dict=True):
            return (latent.repeat(1, 1, 2, 2),)

    with pytest.raises(ValueError, match=r"Doubling makes images of \(24, 24\) of those of \(12, 12\)"):
        reconstruct(Doubling(), random_images(1))


@pytest.mark.parametrize("rounding,levels", [("nearest", 1), ("truncate", 0)])
def test_rounding_comes_before_scores(rounding, levels):
    images = random_images(2).clamp(2, 250)
    tokenizer = ShiftingAutoencoder(0.7)
    assert torch.equal(reconstruct(tokenizer, images, rounding), images + levels)
    psnr = TokenizerFeatures(tokenizer, rounding=rounding)(images)["scores"][:, 0]
    expected = 20 * math.log10(255) if levels else 10 * math.log10(255**2 * 3 * 12 * 12)
    torch.testing.assert_close(psnr, torch.full((2,), expected, dtype=torch.float64))


def test_an_exact_image_counts_as_if_one_value_were_off_by_one():
    images = random_images(2)
    off = images.clone()
    off[0, 0, 0, 0] += 1 if off[0, 0, 0, 0] < 255 else -1
    error = (off.double() - images.double()).square().mean(dim=(1, 2, 3))
    scores = TokenizerFeatures(ShiftingAutoencoder())(images)["scores"]
    torch.testing.assert_close(scores[:, 0], (10 * torch.log10(255**2 / error[:1])).expand(2))
    torch.testing.assert_close(scores[:, 1], torch.ones(2, dtype=torch.float64))


def test_scores_are_those_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    tokenizer, images = tiny_autoencoder(), random_images(3, size=32)
    scores = TokenizerFeatures(tokenizer)(images)["scores"]
    pairs = zip(images, reconstruct(tokenizer, images), scores, strict=True)
    for image, reconstruction, (psnr, ssim) in pairs:
        first, second = (pixels.permute(1, 2, 0).numpy() for pixels in (image, reconstruction))
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(first, second), rel=1e-6)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        expected = structural_similarity(first / 255, second / 255, data_range=1.0, **options)
        assert ssim.item() == pytest.approx(expected, rel=1e-4)


def test_ssim_of_the_data_range_2_is_an_extra_score():
    import piq

    tokenizer, images = tiny_autoencoder(), random_images(2, size=32)
    features = TokenizerFeatures(tokenizer, authors_ssim=True)
    assert features.score_names == ("psnr", "ssim", "ssim_data_range_2")
    scores = features(images)["scores"]
    pair = [pixels.double() / 255 for pixels in (reconstruct(tokenizer, images), images)]
    expected = piq.ssim(*pair, data_range=2.0, downsample=False, reduction="none")
    torch.testing.assert_close(scores[:, 2], expected, rtol=1e-6, atol=0)
    assert (scores[:, 2] > scores[:, 1]).all()


def test_features_are_of_reconstructions_and_of_originals():
    tokenizer, images, extractor = tiny_autoencoder(), random_images(4, size=32), TinyExtractor()
    layers = TokenizerFeatures(tokenizer, extractor)(images)
    assert layers.keys() == {
        "scores",
        *(f"{prefix}{name}" for prefix in ("", "original/") for name in ("pool", "spatial", "logits")),
    }
    for prefix, expected in (("", extractor(reconstruct(tokenizer, images))), ("original/", extractor(images))):
        for name, value in expected.items():
            assert torch.equal(layers[f"{prefix}{name}"], value)
    assert "original/pool" not in TokenizerFeatures(tokenizer, extractor, originals=False)(images)
    assert TokenizerFeatures(tokenizer)(images).keys() == {"scores"}


def test_means_of_scores_are_those_of_all_images():
    tokenizer, images = tiny_autoencoder(), random_images(7, size=32)
    features = TokenizerFeatures(tokenizer, perceptual=absolute_error)
    collector = FeatureCollector(len(images), ("scores",), ())
    for rows in ([4, 5, 6], [0], [1, 2, 3]):
        collector.update(rows, features(images[rows]))
    expected = ReconstructionMetrics(absolute_error)
    expected.update(*(pixels / 127.5 - 1 for pixels in (reconstruct(tokenizer, images), images)))
    found = dict(zip(features.score_names, collector.moments("scores").mean.tolist(), strict=True))
    assert found | {"num_images": 7} == pytest.approx(expected.result(), rel=1e-6)


def test_autocast_changes_nothing():
    tokenizer, images = tiny_autoencoder(), random_images(2, size=32)
    expected = TokenizerFeatures(tokenizer, TinyExtractor())(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reconstruct(tokenizer, images), reconstruct(tokenizer, images))
        found = TokenizerFeatures(tokenizer)(images)
    assert torch.equal(found["scores"], expected["scores"])


def test_protocol_line_says_all():
    names = ("tokenizer", "images", "size", "crop", "dtype", "rounding", "reference", "extractor", "resize", "lpips")
    given = {name: f"<{name}>" for name in names}
    protocol = ReconstructionProtocol(
        **given, tokenizer_digest="1" * 32, images_digest="2" * 32, extractor_digest="3" * 64, num_images=5
    )
    line = protocol.line()
    assert all(f"{name} <{name}>" in line for name in names)
    assert f"extractor digest {'3' * 12};" in line and "num images 5" in line and "data range 1.0" in line
    assert ReconstructionProtocol(**protocol.to_dict()) == protocol
