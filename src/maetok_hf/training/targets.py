"""
What the auxiliary decoders predict: one feature vector per patch of the clean image (MAETok, section 3.2).

How predictions are compared with the features is a switch of every target. The paper writes mean squared error for all
of them; the defaults are those of the released code, which is `"mse"` for [`HOGTarget`] and `"cosine"` for the
features of a [`~maetok_hf.training.teachers.TeacherTarget`].
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn


FEATURE_LOSSES = ("mse", "cosine")


class FeatureTarget(Protocol):
    """
    What [`TokenizerObjective`] asks of a target: an `nn.Module` with two attributes and a forward pass.

    Attributes:
        feature_dim (`int`): Number of features per patch, `D`.
        feature_loss (`str`): How predictions are compared with the features, a name known to [`feature_loss`].
    """

    feature_dim: int
    feature_loss: str

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Clean images in `[-1, 1]`.

        Returns:
            `torch.Tensor` of shape `(batch_size, N, feature_dim)`, patches in row-major order.
        """
        ...


def check_feature_loss(name: str, argument: str = "feature_loss") -> None:
    """
    Refuse a comparison that [`feature_loss`] does not know.

    Args:
        name (`str`): The comparison.
        argument (`str`, *optional*, defaults to `"feature_loss"`): What the caller calls it, for the message.

    Raises:
        ValueError: If `name` is none of `FEATURE_LOSSES`.
    """
    if name not in FEATURE_LOSSES:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, FEATURE_LOSSES))}, got {name!r}.")


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """
    Rows and columns of patches of a batch of images.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        `tuple[int, int]`: Rows and columns, both positive.

    Raises:
        ValueError: If the images do not have three channels or are not a whole number of patches.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"`pixel_values` must have shape (batch_size, 3, height, width), got {tuple(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[-2:]
    if height == 0 or width == 0 or height % patch_size or width % patch_size:
        raise ValueError(
            f"`pixel_values` of {height} x {width} pixels are not a whole number of {patch_size} x {patch_size} "
            "patches: resize or crop them."
        )
    return height // patch_size, width // patch_size


@contextlib.contextmanager
def explained_loading(pretrained_model_name_or_path: str | os.PathLike) -> Iterator[None]:
    """
    Say what to do where a pretrained network of a target cannot be loaded.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): What is being loaded.

    Raises:
        OSError: In place of what was raised inside for missing, unknown or damaged files.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        name = os.fspath(pretrained_model_name_or_path)
        raise OSError(
            f"{name!r} could not be loaded ({type(error).__name__}: {error}). If it is a folder, check the path and "
            "that it holds the files that `save_pretrained` writes, weights as safetensors. If it is on the Hub, "
            f"download it first with `hf download {name}`, on a machine that has a connection. Or leave this target "
            "out."
        ) from error


def feature_loss(prediction: torch.Tensor, target: torch.Tensor, loss_type: str) -> torch.Tensor:
    """
    Distance between predicted and target features at every patch, in float32.

    Args:
        prediction (`torch.Tensor` of shape `(batch_size, N, D)`): Output of an auxiliary decoder.
        target (`torch.Tensor` of shape `(batch_size, N, D)`): Features of the clean image.
        loss_type (`str`): `"mse"` (mean over `D` of the squared difference, in `[0, inf)`) or `"cosine"` (negative
            cosine similarity, in `[-1, 1]`).

    Returns:
        `torch.FloatTensor` of shape `(batch_size, N)`.

    Raises:
        ValueError: If `loss_type` is unknown or the shapes differ.
    """
    check_feature_loss(loss_type, "loss_type")
    if prediction.shape != target.shape:
        raise ValueError(
            f"`prediction` has shape {tuple(prediction.shape)} but `target` has shape {tuple(target.shape)}: the "
            "target must give one feature vector for each image token of the tokenizer."
        )
    prediction, target = prediction.float(), target.float()
    if loss_type == "mse":
        return (prediction - target).square().mean(dim=-1)
    return -F.cosine_similarity(prediction, target, dim=-1)


class HOGTarget(nn.Module):
    """
    Histograms of oriented gradients, as MaskFeat defines them (arXiv 2112.09133, section 3.2) but for any patch and
    image size: the window is the patch and a cell is half of it, 16 and 8 pixels in the paper.

    Sobel gradients of each colour on the reflect-padded image give a magnitude, weighted by a Gaussian window
    (standard deviation half the patch) that is tiled over the image, and an orientation in one of 9 bins over half a
    turn. Magnitudes are summed in cells, and the 9 bins of a cell normalised to unit length. The result does not
    depend on the brightness or the contrast of the image, so `[0, 1]` and `[-1, 1]` give the same features.

    The module is deterministic and holds neither parameters nor buffers: it computes in float32 on the device of its
    input, whatever the default dtype, autocast or `.to()` say.

    Args:
        patch_size (`int`, *optional*, defaults to 16): Side of a patch in pixels, even and positive.
        feature_loss (`str`, *optional*, defaults to `"mse"`): How predictions are compared with the features, see
            [`feature_loss`].

    Raises:
        ValueError: If `patch_size` is not a positive even integer or `feature_loss` is unknown.
    """

    num_bins = 9
    num_colors = 3

    def __init__(self, patch_size: int = 16, feature_loss: str = "mse"):
        super().__init__()
        check_feature_loss(feature_loss)
        if patch_size <= 0 or patch_size % 2:
            raise ValueError(
                f"`patch_size` must be a positive even number, for a cell is half a patch, got {patch_size}."
            )
        self.patch_size = patch_size
        self.feature_loss = feature_loss

    @property
    def feature_dim(self) -> int:
        """Features per patch: colours x bins x 2 x 2 cells."""
        return self.num_colors * self.num_bins * 4

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, feature_dim={self.feature_dim}, feature_loss={self.feature_loss!r}"

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, N, 108)`, patches in row-major order, values in `[0, 1]`. The
            last axis is [colour 3, bin 9, cell row 2, cell column 2].

        Raises:
            ValueError: If the images do not have three channels or are not a whole number of patches.
        """
        rows, columns = patch_grid(pixel_values, self.patch_size)
        batch_size, cell = pixel_values.shape[0], self.patch_size // 2

        with torch.autocast(pixel_values.device.type, enabled=False):
            gradient_x, gradient_y = self._gradients(pixel_values.float())
            magnitude = torch.sqrt(gradient_x.square() + gradient_y.square())
            # half a turn holds the 9 bins: opposite gradients are the same orientation
            bins = (torch.atan2(gradient_x, gradient_y) / math.pi * self.num_bins).floor().remainder(self.num_bins)

            magnitude = magnitude * self._window(magnitude.device).repeat(rows, columns)
            # one pass per bin: a scatter would add in any order on a GPU, and a one-hot would hold 9 images
            cells = (batch_size, self.num_colors, 2 * rows, cell, 2 * columns, cell)
            histograms = [(magnitude * (bins == i)).reshape(cells).sum(dim=(3, 5)) for i in range(self.num_bins)]
            features = F.normalize(torch.stack(histograms, dim=2), dim=2)  # (B, 3, 9, 2 rows, 2 columns)

        features = features.reshape(batch_size, self.num_colors, self.num_bins, rows, 2, columns, 2)
        return features.permute(0, 3, 5, 1, 2, 4, 6).reshape(batch_size, rows * columns, self.feature_dim)

    def _gradients(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sobel gradients along x and y of every colour, each of the shape of the images."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (1, 1, 1, 1), mode="reflect")

        def neighbor(row: int, column: int) -> torch.Tensor:
            return padded[..., row : row + height, column : column + width]

        # Written out rather than as `conv2d`, but in its order of summation: where a gradient cancels, as 8-bit images
        # often have it, rounding decides between the first and the last bin, and a convolution may round (or use TF32)
        # differently on each device.
        left_minus_right = neighbor(0, 0) - neighbor(0, 2)
        left_minus_right = left_minus_right + 2 * neighbor(1, 0) - 2 * neighbor(1, 2)
        left_minus_right = left_minus_right + neighbor(2, 0) - neighbor(2, 2)
        top_minus_bottom = neighbor(0, 0) + 2 * neighbor(0, 1) + neighbor(0, 2)
        top_minus_bottom = top_minus_bottom - neighbor(2, 0) - 2 * neighbor(2, 1) - neighbor(2, 2)
        return left_minus_right, top_minus_bottom

    def _window(self, device: torch.device) -> torch.Tensor:
        """Gaussian weights of the pixels of one patch, of shape `(patch_size, patch_size)`, summing to 1."""
        offset = torch.arange(self.patch_size, dtype=torch.float32, device=device) - (self.patch_size - 1) / 2
        weights = torch.exp(-0.5 * (offset / (self.patch_size / 2)).square())
        window = weights[:, None] * weights
        return window / window.sum()
