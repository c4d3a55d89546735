"""What a training script measures about its result."""

import torch


def peak_signal_to_noise_ratio(reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    PSNR of each image, with the reconstruction clamped to the range of images.

    Args:
        reconstructions (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Decoder outputs.
        images (`torch.Tensor` of the same shape): Images in `[-1, 1]`, so the peak is 2.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: `10 log10(4 / mean squared error)` in dB, float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if reconstructions.shape != images.shape:
        raise ValueError(
            f"`reconstructions` has shape {tuple(reconstructions.shape)} but `images` has {tuple(images.shape)}."
        )
    difference = reconstructions.detach().cpu().double().clamp(-1, 1) - images.detach().cpu().double()
    return 10 * torch.log10(4 / difference.square().flatten(1).mean(dim=1))
