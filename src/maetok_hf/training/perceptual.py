"""Perceptual distance between images: LPIPS (arXiv 1801.03924) by the `lpips` package, as a loss."""

import os
import warnings

import torch
from torch import nn


NETWORKS = ("vgg", "alex", "squeeze")


class PerceptualLoss(nn.Module):
    """
    LPIPS of reconstructions. The network is frozen and stays in evaluation mode; gradients flow to the reconstructions
    only.

    It always runs in float32, also under autocast, so that distances, and an adaptive weight made of their gradients,
    do not depend on a run's precision. Differences of nearly equal features lose their digits in bfloat16, and
    features that are all zero divide by zero in float16. (On recent GPUs torch runs float32 convolutions in TF32 by
    default.)

    Args:
        lpips (`lpips.LPIPS`): The network, for example from [`PerceptualLoss.from_pretrained`].
    """

    def __init__(self, lpips: nn.Module):
        super().__init__()
        self.lpips = lpips.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_pretrained(cls, network: str = "vgg") -> "PerceptualLoss":
        """
        LPIPS 0.1 with the published linear heads, which the `lpips` package holds, on a trunk trained on ImageNet,
        which torchvision downloads once into the cache of `torch.hub`.

        Args:
            network (`str`, *optional*, defaults to `"vgg"`): Trunk: `"vgg"`, `"alex"` or `"squeeze"`. The paper trains
                with VGG; AlexNet is the usual choice for evaluation.

        Returns:
            [`PerceptualLoss`]: On the CPU.

        Raises:
            ValueError: If `network` is unknown.
            OSError: If the weights of the trunk are neither in the cache nor can be downloaded.
        """
        if network not in NETWORKS:
            raise ValueError(f"`network` must be one of {', '.join(map(repr, NETWORKS))}, got {network!r}.")
        import lpips

        try:
            with warnings.catch_warnings():
                # lpips asks torchvision for weights in the way of 2021
                warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models\._utils")
                return cls(lpips.LPIPS(net=network, verbose=False))
        except OSError as error:
            url = _trunk_url(network)
            folder = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise OSError(
                f"the trunk of LPIPS ({network}) could not be loaded: {error}. Without a network, download {url} "
                f"elsewhere and put it into {folder} as {os.path.basename(url)}."
            ) from error

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Like `nn.Module.train`, but the network stays in evaluation mode: its heads have dropout."""
        super().train(mode)
        self.lpips.eval()
        return self

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            reconstruction (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`; they are
                not clamped.
            images (`torch.Tensor` of the same shape): What they should look like, in `[-1, 1]`. No gradient.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`: Distances, 0 for equal images.

        Raises:
            ValueError: If the shapes differ.
        """
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"`reconstruction` has shape {tuple(reconstruction.shape)} but `images` {tuple(images.shape)}: both "
                "must be the same images."
            )
        with torch.autocast(images.device.type, enabled=False):
            distances = self.lpips(reconstruction.float(), images.detach().float())
        return distances.flatten()


def _trunk_url(network: str) -> str:
    """Where torchvision downloads the trunk from."""
    from torchvision import models

    weights = {
        "vgg": models.VGG16_Weights,
        "alex": models.AlexNet_Weights,
        "squeeze": models.SqueezeNet1_1_Weights,
    }
    return weights[network].IMAGENET1K_V1.url
