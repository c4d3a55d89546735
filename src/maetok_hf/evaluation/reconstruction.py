"""
What a tokenizer loses: rFID, PSNR, SSIM and LPIPS of reconstructions, for any autoencoder of diffusers.

Reconstructions are rounded to 8 bits before anything is measured, as if they had been written to files.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from diffusers import AutoencoderRAE, ModelMixin

from ..models import AutoencoderMAE
from ..sampling import to_uint8
from ..training.latent_encoding import encode_grid
from ..training.validation import peak_signal_to_noise_ratio, structural_similarity
from .extractors import FeatureExtractor, full_float32
from .protocol import DIGEST_LENGTH


ORIGINAL = "original/"
SCORES = "scores"
SSIM_DEFINITION = "Gaussian window of 11 x 11 inside the image, data range 1.0"


class TokenizerFeatures:
    """
    From images to what is measured of their reconstructions: an extractor for [`FeatureRun`] or [`FeatureCollector`].

    The statistics of the layer `"scores"` hold the mean of each score over all images, those of `"pool"` and
    `"original/pool"` are compared for rFID: reconstructions of held-out images against these images themselves. It is
    no FID of generated images, whose reference is the training set, and neither says anything about the other.

    All is computed without TF32, scores in float64. The PSNR of an image that is reconstructed exactly would be
    infinite, and the mean with it: it counts with the PSNR of an image of its size with one value off by one level,
    101 dB at 256 x 256.

    Args:
        tokenizer (`ModelMixin`): In evaluation mode, on its device and in its type: [`AutoencoderMAE`], or diffusers'
            `AutoencoderKL`, `AutoencoderDC`, `AutoencoderRAE` and the like.
        extractor ([`FeatureExtractor`], *optional*): What gives features; without one there are scores only.
        perceptual (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*): LPIPS, such as
            [`~maetok_hf.training.perceptual.PerceptualLoss`]: takes reconstructions and images in `[-1, 1]` and
            returns one number for each image.
        rounding (`str`, *optional*, defaults to `"nearest"`): From decoder outputs to 8 bits, `"nearest"` or
            `"truncate"` of [`~maetok_hf.sampling.to_uint8`].
        originals (`bool`, *optional*, defaults to `True`): Whether features of the images themselves are computed,
            too. Not needed if their statistics are there.
        authors_ssim (`bool`, *optional*, defaults to `False`): Whether to add the SSIM of the data range 2.0, which
            the authors of MAETok took for images in `[0, 1]`. It is higher, and for comparisons with their numbers
            only.
    """

    def __init__(
        self,
        tokenizer: ModelMixin,
        extractor: FeatureExtractor | None = None,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        rounding: str = "nearest",
        originals: bool = True,
        authors_ssim: bool = False,
    ):
        self.tokenizer, self.extractor, self.perceptual = tokenizer, extractor, perceptual
        self.rounding, self.originals, self.authors_ssim = rounding, originals, authors_ssim

    @property
    def score_names(self) -> tuple[str, ...]:
        """`tuple[str, ...]`: What the columns of `"scores"` are: `psnr` in dB, `ssim`, and what else is asked for."""
        optional = {"lpips": self.perceptual is not None, "ssim_data_range_2": self.authors_ssim}
        return ("psnr", "ssim", *(name for name, wanted in optional.items() if wanted))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.ByteTensor` of shape `(n, 3, height, width)`): In `[0, 255]`.

        Returns:
            `dict[str, torch.Tensor]`: `"scores"` in float64 of shape `(n, len(score_names))`, and with an extractor
            its layers of the reconstructions, and of the originals under `"original/pool"` and so on.

        Raises:
            ValueError: If the images are too small for SSIM, or do not fit the tokenizer.
            FloatingPointError: If a reconstruction is not finite.
        """
        reconstructions = reconstruct(self.tokenizer, images, self.rounding)
        layers = {SCORES: self._scores(reconstructions, images)}
        if self.extractor is not None:
            layers |= self.extractor(reconstructions)
            if self.originals:
                layers |= {f"{ORIGINAL}{name}": value for name, value in self.extractor(images).items()}
        return layers

    def _scores(self, reconstructions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        device = self.tokenizer.device
        pair = [to_pixels(pixels, device) for pixels in (reconstructions, images)]
        one_level = 10 * torch.tensor(255.0**2 * images[0].numel(), dtype=torch.float64).log10()
        scores = {
            "psnr": peak_signal_to_noise_ratio(*pair).minimum(one_level),
            "ssim": structural_similarity(*pair),
        }
        if self.perceptual is not None:
            with full_float32(device):
                scores["lpips"] = self.perceptual(*pair)
        if self.authors_ssim:
            # SSIM does not change when images and data range are halved together
            scores["ssim_data_range_2"] = structural_similarity(*((pixels - 1) / 2 for pixels in pair))
        return torch.stack([scores[name].double().cpu() for name in self.score_names], dim=1)


def to_pixels(images: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    What tokenizers take.

    Args:
        images (`torch.ByteTensor`): In `[0, 255]`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the result shall be.

    Returns:
        `torch.FloatTensor` of the same shape: In `[-1, 1]`.
    """
    return images.to(device).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(tokenizer: ModelMixin, images: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """
    Encode and decode 8-bit images; of a Gaussian posterior the mode is decoded.

    Args:
        tokenizer (`ModelMixin`): In evaluation mode; it computes in its own type, without TF32 and autocast.
        images (`torch.ByteTensor` of shape `(n, 3, height, width)`): In `[0, 255]`.
        rounding (`str`, *optional*, defaults to `"nearest"`): As [`~maetok_hf.sampling.to_uint8`] has it.

    Returns:
        `torch.ByteTensor` of the same shape, on the CPU: In `[0, 255]`.

    Raises:
        ValueError: If the images do not fit the tokenizer, or come out in another size.
        FloatingPointError: If a reconstruction is not finite.
    """
    pixels = to_pixels(images, tokenizer.device).to(tokenizer.dtype)
    # only ours decodes to a size that latents do not tell
    size = tuple(images.shape[2:]) if isinstance(tokenizer, AutoencoderMAE) else ()
    with full_float32(tokenizer.device):
        decoded = tokenizer.decode(encode_grid(tokenizer, pixels), *size, return_dict=False)[0].float()
    if isinstance(tokenizer, AutoencoderRAE):
        decoded = 2 * decoded - 1  # the only one that gives images in [0, 1]
    if decoded.shape[2:] != images.shape[2:]:
        raise ValueError(
            f"{type(tokenizer).__name__} makes images of {tuple(decoded.shape[2:])} of those of "
            f"{tuple(images.shape[2:])} pixels: choose a resolution that it keeps."
        )
    return to_uint8(decoded, rounding).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class ReconstructionProtocol:
    """
    The conditions of an evaluation of a tokenizer, to be printed and stored with every number of it.

    Args:
        tokenizer (`str`): Its class and name.
        tokenizer_digest (`str`): Of its weights.
        images (`str`): What was reconstructed.
        images_digest (`str`): Of some of them.
        num_images (`int`): How many.
        size (`str`): Height and width in pixels.
        crop (`str`): How images got that size.
        dtype (`str`): In which the tokenizer computed.
        rounding (`str`): From its outputs to 8 bits.
        reference (`str`): What rFID compares with.
        extractor (`str`): Name of the network that gives features.
        extractor_digest (`str`): Of its weights.
        resize (`str`): How it brings images to its size.
        lpips (`str`): Its network and a digest of the weights.
        ssim (`str`, *optional*): Its definition.
    """

    tokenizer: str
    tokenizer_digest: str
    images: str
    images_digest: str
    num_images: int
    size: str
    crop: str
    dtype: str
    rounding: str
    reference: str
    extractor: str
    extractor_digest: str
    resize: str
    lpips: str
    ssim: str = SSIM_DEFINITION

    def to_dict(self) -> dict[str, Any]:
        """All conditions by name, plain types."""
        return asdict(self)

    def line(self) -> str:
        """
        All conditions in one line, to be printed under the numbers.

        Returns:
            `str`: `name value` of each, separated by semicolons; digests are shortened.
        """
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            value = value[:DIGEST_LENGTH] if field.name.endswith("_digest") else value
            parts.append(f"{field.name.replace('_', ' ')} {value}")
        return "; ".join(parts)
