"""Metrics of known errors, averages that count every image once, and pictures."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maetok_hf.training.validation import (
    ReconstructionMetrics,
    peak_signal_to_noise_ratio,
    reconstruction_grid,
    structural_similarity,
    write_png,
)
from tests.testing_utils import seeded_normal


def some_images(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return (seeded_normal(count, 3, size, size, seed=seed) / 2).clamp(-1, 1)


def absolute_error(reconstructions, images):
    """Stands for a perceptual distance."""
    return (reconstructions - images).abs().flatten(1).mean(dim=1)


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


@pytest.mark.parametrize("metric", [peak_signal_to_noise_ratio, structural_similarity])
def test_overshoot_beyond_the_range_of_images_does_not_count(metric):
    images = torch.ones(1, 3, 16, 16)
    images[..., 0] = 0
    reconstructions = images.clone()
    reconstructions[..., 0] = 0.1
    overshoot = torch.where(images == 1, 3.0, reconstructions)
    assert torch.equal(metric(overshoot, images), metric(reconstructions, images))


@pytest.mark.parametrize("metric", [peak_signal_to_noise_ratio, structural_similarity, reconstruction_grid])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\)"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module", params=["astronaut", "chelsea", "coffee"])
def photograph(request):
    """A photograph and a noisy copy of it, both 8-bit, of shape (256, 256, 3)."""
    image = getattr(pytest.importorskip("skimage.data"), request.param)()[20:276, 100:356]
    noise = 20 * seeded_normal(*image.shape).numpy()
    return image, (image + noise).clip(0, 255).round().astype(np.uint8)


def to_pixel_values(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1


def test_psnr_of_photographs_is_that_of_piq_and_scikit_image(photograph):
    import piq
    from skimage.metrics import peak_signal_noise_ratio

    image, noisy = photograph
    first, second = to_pixel_values(noisy), to_pixel_values(image)
    found = peak_signal_to_noise_ratio(first, second).item()
    assert found == pytest.approx(peak_signal_noise_ratio(image, noisy, data_range=255), rel=1e-6)
    assert found == pytest.approx(piq.psnr((first + 1) / 2, (second + 1) / 2, data_range=1.0).item(), rel=1e-6)


def test_ssim_of_photographs_is_that_of_scikit_image(photograph):
    from skimage.metrics import structural_similarity as independent

    image, noisy = photograph
    found = structural_similarity(to_pixel_values(noisy), to_pixel_values(image)).item()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    assert found == pytest.approx(independent(noisy / 255, image / 255, channel_axis=2, **options), rel=1e-4)


def test_ssim_of_photographs_is_that_of_piq(photograph):
    import piq

    image, noisy = photograph
    found = structural_similarity(to_pixel_values(noisy), to_pixel_values(image)).item()
    mapped = [(to_pixel_values(pixels) + 1) / 2 for pixels in (noisy, image)]
    assert found == pytest.approx(piq.ssim(*mapped, data_range=1.0, downsample=False).item(), rel=1e-4)


def test_ssim_of_constant_images_is_their_luminance_term():
    """Without variance SSIM is (2 a b + C) / (a^2 + b^2 + C), for a data range of 1 with C = 0.01^2."""
    images, reconstructions = torch.full((1, 3, 12, 12), -0.5), torch.full((1, 3, 12, 12), 0.5)  # 1/4 and 3/4
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    torch.testing.assert_close(
        structural_similarity(reconstructions, images), torch.tensor([expected], dtype=torch.float64)
    )


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    images = some_images(2)
    noise = seeded_normal(2, 3, 16, 16, seed=1)
    values = [structural_similarity(images + scale * noise, images) for scale in (0.0, 0.1, 0.5)]
    torch.testing.assert_close(values[0], torch.ones(2, dtype=torch.float64))
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()


def test_ssim_refuses_images_smaller_than_its_window():
    assert structural_similarity(torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 11)).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="8 x 16 pixels, but SSIM has a window of 11 x 11"):
        structural_similarity(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_ssim_does_not_depend_on_autocast():
    images = some_images(1)
    reconstructions = images + 0.1 * seeded_normal(1, 3, 16, 16, seed=1)
    expected = structural_similarity(reconstructions, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(structural_similarity(reconstructions, images), expected)


def test_every_image_counts_once_however_they_are_batched_and_distributed():
    images = some_images(5)
    reconstructions = images + 0.2 * seeded_normal(5, 3, 16, 16, seed=1)
    expected = {
        "psnr": peak_signal_to_noise_ratio(reconstructions, images).mean().item(),
        "ssim": structural_similarity(reconstructions, images).double().mean().item(),
        "lpips": absolute_error(reconstructions.clamp(-1, 1), images).double().mean().item(),
        "num_images": 5,
    }
    processes = [ReconstructionMetrics(absolute_error) for _ in range(3)]  # the last one gets no image
    for process, part in ((0, slice(0, 2)), (0, slice(2, 3)), (1, slice(3, 5))):
        processes[process].update(reconstructions[part], images[part])
    states = torch.stack([process.state() for process in processes])
    assert states.dtype == torch.float64
    assert ReconstructionMetrics.merged(states).result() == pytest.approx(expected, rel=1e-6)


def test_lpips_is_absent_without_a_network():
    metrics = ReconstructionMetrics()
    metrics.update(some_images(1), some_images(1, seed=1))
    assert metrics.result().keys() == {"psnr", "ssim", "num_images"}
    assert ReconstructionMetrics.merged([metrics.state()]).result() == metrics.result()


def test_a_perceptual_network_must_return_one_number_for_each_image():
    metrics = ReconstructionMetrics(lambda reconstructions, images: (reconstructions - images).mean())
    with pytest.raises(ValueError, match=r"one number for each of 2 images, got a tensor of shape \(\)"):
        metrics.update(some_images(2), some_images(2))


def test_metrics_of_no_image_are_refused():
    with pytest.raises(ValueError, match="No images were added"):
        ReconstructionMetrics().result()


def test_grid_shows_each_image_above_its_reconstruction():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    images = levels[:, None, None, None].expand(3, 3, 4, 5)
    picture = reconstruction_grid(images, -images, columns=2)
    assert picture.dtype == np.uint8 and picture.shape == (2 * 8 + 4, 2 * 5 + 2, 3)
    assert (picture[0:4, 0:5] == 0).all() and (picture[4:8, 0:5] == 255).all()
    assert (picture[0:8, 7:12] == 128).all()
    assert (picture[12:16, 0:5] == 255).all() and (picture[16:20, 0:5] == 0).all()
    assert (picture[12:20, 7:12] == 255).all(), "no fourth image"


def test_grid_keeps_colours_clamps_and_shows_grey_images():
    images = torch.tensor([5.0, -5.0, float("nan")])[None, :, None, None].expand(1, 3, 4, 4)
    assert (reconstruction_grid(images, images) == [255, 0, 0]).all()
    assert reconstruction_grid(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).shape == (8, 4, 3)
    with pytest.raises(ValueError, match="at least one, got 0"):
        reconstruction_grid(images[:0], images[:0])


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    path = tmp_path / "pictures" / "step-5.png"
    write_png(path, picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_png(path, np.zeros((4, 4, 3)))  # not uint8
    assert path.read_bytes() == before
    assert [item.name for item in Path(path.parent).iterdir()] == ["step-5.png"]
