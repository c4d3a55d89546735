"""What a training script measures about its result: PSNR, SSIM and LPIPS of reconstructions, and pictures of them."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image


SSIM_WINDOW = 11  # Gaussian of standard deviation 1.5 (Wang et al., 2004)
SEPARATOR = 2  # pixels between two pictures of a grid


def peak_signal_to_noise_ratio(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    PSNR of each image, with the reconstruction clamped to the range of images.

    Args:
        reconstructions (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Decoder outputs.
        images (`torch.Tensor` of the same shape): Images in `[-1, 1]`, so the peak is 2.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: `10 log10(4 / mean squared error)` in dB, float64, on the CPU.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(reconstructions, images)
    difference = reconstructions.detach().cpu().double().clamp(-1, 1) - images.detach().cpu().double()
    return 10 * torch.log10(4 / difference.square().flatten(1).mean(dim=1))


def structural_similarity(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    SSIM of each image by torchmetrics: a Gaussian window of 11 x 11 pixels, images mapped to `[0, 1]`, data range 1,
    the mean over colours and over the pixels whose window lies in the image, as scikit-image and piq have it.
    torchmetrics itself also counts windows that reach over the border, into reflections: up to 0.03 at 64 x 64.

    Args:
        reconstructions (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Decoder outputs; they are clamped
            to the range of images.
        images (`torch.Tensor` of the same shape): Images in `[-1, 1]`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: At most 1, on the device of the images; float64 where it has that.

    Raises:
        ValueError: If the shapes differ, or a side is shorter than the window: SSIM is not defined there.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_shapes(reconstructions, images)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"`images` are {images.shape[-2]} x {images.shape[-1]} pixels, but SSIM has a window of {SSIM_WINDOW} x "
            f"{SSIM_WINDOW}: measure it at a larger resolution."
        )
    # Variances are differences of nearly equal numbers: on flat images float32 is off by 5e-4, bfloat16 useless.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    with torch.autocast(images.device.type, enabled=False):
        mapped = [(tensor.detach().to(dtype).clamp(-1, 1) + 1) / 2 for tensor in (reconstructions, images)]
        options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
        _, of_pixels = structural_similarity_index_measure(*mapped, **options)
    border = SSIM_WINDOW // 2
    return of_pixels[..., border:-border, border:-border].flatten(1).mean(dim=1)


class ReconstructionMetrics:
    """
    Mean PSNR, SSIM and, if a network for it is given, LPIPS over images that come in batches, in float64.

    On several processes each adds its own batches, and the states of all are merged; a process without any image
    takes part like the others:

    ```python
    metrics = ReconstructionMetrics(perceptual)
    for batch in held_out:
        metrics.update(tokenizer(batch).sample, batch)
    states = accelerator.gather(metrics.state()[None].to(accelerator.device))
    result = ReconstructionMetrics.merged(states).result()
    ```

    Args:
        perceptual (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*): LPIPS: takes reconstructions
            and images in `[-1, 1]` and returns one number for each image.
    """

    def __init__(self, perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None):
        self.perceptual = perceptual
        self._sums = torch.zeros(3 if perceptual is None else 4, dtype=torch.float64)

    @torch.no_grad()
    def update(self, reconstructions: torch.Tensor, images: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            reconstructions (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Decoder outputs; what lies
                outside the range of images is clamped.
            images (`torch.Tensor` of the same shape): Images in `[-1, 1]`.

        Raises:
            ValueError: If the shapes differ, the images are too small for SSIM, or `perceptual` does not return one
                number for each image.
        """
        values = [
            peak_signal_to_noise_ratio(reconstructions, images),
            structural_similarity(reconstructions, images),
        ]
        if self.perceptual is not None:
            distances = self.perceptual(reconstructions.float().clamp(-1, 1), images.float())
            if distances.shape != (len(images),):
                raise ValueError(
                    f"`perceptual` must return one number for each of {len(images)} images, got a tensor of shape "
                    f"{tuple(distances.shape)}."
                )
            values.append(distances)
        sums = [value.double().sum().cpu() for value in values]
        self._sums += torch.stack([torch.tensor(len(images), dtype=torch.float64), *sums])

    def state(self) -> torch.Tensor:
        """The number of images and the sums, one float64 tensor of shape `(3,)` or, with LPIPS, `(4,)`."""
        return self._sums.clone()

    @classmethod
    def merged(cls, states: Iterable[torch.Tensor]) -> "ReconstructionMetrics":
        """
        The metrics of several processes together.

        Args:
            states (`Iterable[torch.Tensor]`): What [`~ReconstructionMetrics.state`] of each gave.

        Returns:
            [`ReconstructionMetrics`]: For its result; it has no network to add images with.
        """
        metrics = cls()
        metrics._sums = torch.stack([state.cpu().double() for state in states]).sum(dim=0)
        return metrics

    @property
    def num_images(self) -> int:
        """`int`: Images added."""
        return int(self._sums[0])

    def result(self) -> dict[str, float]:
        """
        The means over all images.

        Returns:
            `dict[str, float]`: `psnr` in dB, `ssim`, with a network `lpips`, and `num_images`.

        Raises:
            ValueError: If no image was added.
        """
        count, *sums = self._sums.tolist()
        if count == 0:
            raise ValueError("No images were added, so there is nothing to average.")
        means = {name: total / count for name, total in zip(("psnr", "ssim", "lpips"), sums, strict=False)}
        return means | {"num_images": int(count)}


def reconstruction_grid(images: torch.Tensor, reconstructions: torch.Tensor, columns: int = 8) -> np.ndarray:
    """
    A picture with each image above its reconstruction.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`): Images in `[-1, 1]` of 3 channels, or
            of one, shown in grey.
        reconstructions (`torch.Tensor` of the same shape): Decoder outputs; they are clamped, NaN is black.
        columns (`int`, *optional*, defaults to 8): Images side by side; further ones follow below.

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)`: The picture, uint8, on a white background.

    Raises:
        ValueError: If the shapes differ, there is no image, or `columns` is not positive.
    """
    _check_shapes(reconstructions, images)
    # directly below: a difference at the common edge shows
    return image_grid(torch.cat([images, reconstructions], dim=2), columns, row_gap=2 * SEPARATOR)


def image_grid(images: torch.Tensor, columns: int = 8, row_gap: int = SEPARATOR) -> np.ndarray:
    """
    A picture of images side by side.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`): Images in `[-1, 1]` of 3 channels, or
            of one, shown in grey; they are clamped, NaN is black.
        columns (`int`, *optional*, defaults to 8): Images side by side; further ones follow below.
        row_gap (`int`, *optional*, defaults to 2): Pixels between rows.

    Returns:
        `numpy.ndarray` of shape `(height, width, 3)`: The picture, uint8, on a white background.

    Raises:
        ValueError: If there is no image, or `columns` is not positive.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"`images` and `columns` must be at least one, got {len(images)} and {columns}.")
    tiles = _to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height + row_gap, width + SEPARATOR
    picture = np.full((rows * step_y - row_gap, columns * step_x - SEPARATOR, 3), 255, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        y, x = index // columns * step_y, index % columns * step_x
        picture[y : y + height, x : x + width] = tile
    return picture


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """
    Write a picture that is whole or absent; its folder is made if needed.

    Args:
        path (`str` or `Path`): The file; an earlier one is replaced.
        picture (`numpy.ndarray` of shape `(height, width, 3)`): The picture, uint8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    values = images.detach().cpu().float().nan_to_num(-1).clamp(-1, 1)
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _check_shapes(reconstructions: torch.Tensor, images: torch.Tensor) -> None:
    if reconstructions.shape != images.shape:
        raise ValueError(
            f"`reconstructions` has shape {tuple(reconstructions.shape)} but `images` has {tuple(images.shape)}."
        )
