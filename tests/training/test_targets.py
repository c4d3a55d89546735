import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maetok_hf.training.targets import HOGTarget, explained_loading, feature_loss, patch_grid


GOLDEN = Path(__file__).parents[1] / "golden" / "hog.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def reference_hog(image, patch):
    """The definition, pixel by pixel in float64: an independent reading of MaskFeat."""
    image = image.double()
    channels, height, width = image.shape
    cell = patch // 2

    def pixel(channel, y, x):
        y, x = abs(y), abs(x)
        y = 2 * (height - 1) - y if y >= height else y
        x = 2 * (width - 1) - x if x >= width else x
        return image[channel, y, x].item()

    cells = torch.zeros(channels, 9, height // cell, width // cell, dtype=torch.float64)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                gx = gy = 0.0
                for offset, weight in ((-1, 1), (0, 2), (1, 1)):
                    gx += weight * (pixel(channel, y + offset, x - 1) - pixel(channel, y + offset, x + 1))
                    gy += weight * (pixel(channel, y - 1, x + offset) - pixel(channel, y + 1, x + offset))
                dy, dx = y % patch - (patch - 1) / 2, x % patch - (patch - 1) / 2
                weight = math.exp(-0.5 * (dy**2 + dx**2) / cell**2)
                bin_index = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                cells[channel, bin_index, y // cell, x // cell] += weight * math.hypot(gx, gy)
    cells = cells / cells.norm(dim=1, keepdim=True)
    rows, columns = height // patch, width // patch
    patches = [
        cells[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(patches).float()


def test_hog_matches_golden(golden):
    features = HOGTarget(patch_size=16)(golden["image"])
    assert features.dtype == torch.float32
    assert (features - golden["hog"]).abs().max() < 1e-5


@pytest.mark.parametrize(("patch", "height", "width"), [(4, 8, 16), (6, 18, 12), (8, 24, 16), (16, 16, 32)])
def test_hog_matches_its_definition_at_any_patch_and_image_size(patch, height, width):
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(patch)) * 2 - 1
    features = HOGTarget(patch)(images)
    assert features.shape == (1, height // patch * (width // patch), 108)
    assert (features[0] - reference_hog(images[0], patch)).abs().max() < 1e-4


def test_hog_groups_features_by_patch_at_512_pixels():
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = HOGTarget(16)(image)
    assert features.shape == (1, 1024, 108)
    # patch (row 5, column 20), far from the border: the window is tiled, so a crop around it gives the same features
    crop = HOGTarget(16)(image[..., 64:112, 304:352])
    assert (features[0, 5 * 32 + 20] - crop[0, 4]).abs().max() < 1e-5


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48), (256, 256)])
def test_gradients_round_as_the_convolution_of_the_definition(height, width):
    # 8-bit images are full of gradients that cancel, whose bin hangs on the rounding
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, height, width), generator=generator).float() / 127.5 - 1
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    for gradient, kernel in zip(HOGTarget(16)._gradients(images), (sobel, sobel.T), strict=True):
        expected = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 3, 3), groups=3)
        assert (gradient == expected).float().mean() > 0.999


def test_vertical_and_horizontal_edges_fall_in_their_bins():
    vertical = torch.zeros(1, 3, 16, 16)
    vertical[..., 8:] = 1.0
    bins = HOGTarget(16)(vertical).reshape(3, 9, 2, 2)
    # a gradient along x only has the phase atan2(+-g, 0) = +-pi / 2, bin floor(+-4.5) mod 9 = 4
    assert torch.equal(bins[:, 4], torch.ones(3, 2, 2)) and bins.sum() == 12
    horizontal = HOGTarget(16)(vertical.transpose(2, 3)).reshape(3, 9, 2, 2)
    assert torch.equal(horizontal[:, 0], torch.ones(3, 2, 2)) and horizontal.sum() == 12


def test_hog_ignores_brightness_and_contrast(golden):
    target = HOGTarget(16)
    assert (target(golden["image"] * 0.5 + 0.5) - golden["hog"]).abs().max() < 1e-4


def test_a_flat_image_has_no_gradient_and_no_nan():
    assert torch.equal(HOGTarget(4)(torch.full((2, 3, 8, 8), 0.3)), torch.zeros(2, 4, 108))


def test_hog_does_not_depend_on_default_dtype_module_dtype_or_autocast(golden):
    expected = HOGTarget(16)(golden["image"])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(HOGTarget(16)(golden["image"]), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(HOGTarget(16).to(torch.bfloat16)(golden["image"]), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(HOGTarget(16)(golden["image"]), expected)


def test_hog_has_no_state_and_no_gradient(golden):
    target = HOGTarget(16)
    assert isinstance(target, nn.Module) and not target.state_dict() and not list(target.parameters())
    assert not target(golden["image"].clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("patch_size", [0, -2, 7])
def test_hog_refuses_a_patch_that_has_no_half(patch_size):
    with pytest.raises(ValueError, match=f"`patch_size` must be a positive even number.*{patch_size}"):
        HOGTarget(patch_size)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 20), (2, 3, 8, 16), (2, 3, 0, 16)])
def test_hog_refuses_images_that_are_not_whole_patches(shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        HOGTarget(16)(torch.zeros(shape))


def test_mse_feature_loss_by_hand():
    prediction = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    assert torch.equal(feature_loss(prediction, target, "mse"), torch.tensor([[2.5, 12.5]]))


def test_cosine_feature_loss_by_hand():
    prediction = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-3.0, 0.0], [1.0, 1.0]]])
    target = torch.tensor([[[7.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    expected = torch.tensor([[-1.0, 0.0, 1.0, -math.sqrt(0.5)]])
    assert torch.allclose(feature_loss(prediction, target, "cosine"), expected, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_feature_loss_pushes_predictions_towards_the_target(loss_type):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    target = torch.randn(2, 3, 8, generator=generator)
    loss = feature_loss(prediction, target, loss_type)
    assert loss.shape == (2, 3)
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    # stepping against the gradient of one position moves along the target there
    assert (feature_loss(prediction - 0.1 * gradient, target, loss_type) < loss).all()
    assert ((gradient * target).sum(-1) <= (gradient * prediction).sum(-1) + 1e-6).all()


def test_feature_loss_is_computed_in_float32():
    prediction = torch.full((1, 1, 4), 1000.0, dtype=torch.float16)
    loss = feature_loss(prediction, torch.zeros(1, 1, 4, dtype=torch.float16), "mse")
    assert loss.dtype == torch.float32 and loss.item() == 1e6  # beyond float16


def test_feature_loss_refuses_unknown_kinds_and_other_shapes():
    with pytest.raises(ValueError, match="'l1'"):
        feature_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), "l1")
    with pytest.raises(ValueError, match="one feature vector for each image token"):
        feature_loss(torch.zeros(1, 4, 2), torch.zeros(1, 1, 2), "mse")


def test_the_comparison_is_a_switch_of_the_target_with_the_released_code_as_default():
    assert HOGTarget(4).feature_loss == "mse"
    assert HOGTarget(4, feature_loss="cosine").feature_loss == "cosine"
    with pytest.raises(ValueError, match="`feature_loss` must be one of 'mse', 'cosine', got 'l1'"):
        HOGTarget(4, feature_loss="l1")


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_the_target_side_of_a_feature_loss_may_be_in_low_precision(loss_type):
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 2, 3, 8, generator=generator).unbind(0)
    expected = feature_loss(prediction, target.bfloat16().float(), loss_type)
    assert torch.equal(feature_loss(prediction, target.bfloat16(), loss_type), expected)


def test_patch_grid_counts_rows_and_columns():
    assert patch_grid(torch.zeros(2, 3, 48, 16), 16) == (3, 1)


def test_loading_errors_say_what_to_do():
    with pytest.raises(OSError, match=r"(?s)'some/repo'.*ValueError: no such.*`hf download some/repo`.*leave this"):
        with explained_loading("some/repo"):
            raise ValueError("no such thing")
