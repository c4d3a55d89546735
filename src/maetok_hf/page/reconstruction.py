"""What a tokenizer makes of a person's image: its reconstruction, its tokens, and which token stands for what."""

import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..data.sources import CorruptImageError, decode_image
from ..data.transforms import ImageTransform, size_names, to_pixel_values
from ..models.latents import normalize_latents
from ..pipelines import MAETokDiffusionPipeline
from ..sampling import to_uint8
from ..training.latent_encoding import encode_grid
from ..training.validation import peak_signal_to_noise_ratio
from .pictures import heat_map


# what PIL decodes itself: some other formats start programs or read files that they name
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_FILE_SIZE = 50 * 2**20
# three bytes each: 200 MB, more than any camera's picture
MAX_PIXELS = 2**26
# decoded at once, to bound the memory of a device
TOKEN_BATCH = 16

NOTES = {
    "grayscale": "It is gray.",
    "palette": "Its palette was resolved.",
    "cmyk": "It was converted from CMYK.",
    "sixteen_bit": "It has 16 bits a pixel, which were scaled to 8.",
    "other_mode": "It was converted to RGB from another color space.",
    "transparent": "It is transparent: it was put on white.",
    "rotated": "It was turned upright, as its EXIF data say.",
    "huge": "It has very many pixels.",
    "enlarged": "It is smaller than the model's images and was enlarged.",
    "elongated": "It is very long: its ends were cut off.",
}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """
    A person's image.

    Args:
        image (`PIL.Image.Image`): Upright, of mode `RGB`.
        notes (`tuple[str, ...]`): What was unusual about the file, in sentences.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def open_upload(path: str | os.PathLike) -> Upload:
    """
    Read an image that somebody uploaded, with care.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        [`Upload`]: The image; of an animation, the first frame.

    Raises:
        ValueError: If it is empty, too large, no image of `FORMATS`, or damaged; the message is for that person.
    """
    size = Path(path).stat().st_size
    if size == 0:
        raise ValueError("This file is empty: choose another one.")
    if size > MAX_FILE_SIZE:
        raise ValueError(f"This file has {size / 2**20:.0f} MB, more than the {MAX_FILE_SIZE // 2**20} MB allowed.")
    # in memory, so that the file may go while it is decoded
    content = io.BytesIO(Path(path).read_bytes())
    try:
        with warnings.catch_warnings():
            # the size is checked below, more strictly
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            # a build of PIL may lack some
            image = Image.open(content, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(f"This file is no image that can be read: choose a {', '.join(FORMATS[:6])} file.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"This image has more than the {MAX_PIXELS // 10**6} million pixels allowed.") from error
    except Exception as error:  # decoders raise anything on damaged headers
        raise ValueError("This image is damaged and cannot be read: choose another one.") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"This image has {image.width} × {image.height} pixels, more than the {MAX_PIXELS // 10**6} million "
                "allowed: make it smaller first."
            )
        # the other pictures of a camera's file are previews
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        try:
            upright, names = decode_image(image)
        except CorruptImageError as error:
            raise ValueError("This image is damaged and cannot be read: choose another one.") from error
    notes = [NOTES[name] for name in names]
    if frames > 1:
        notes.insert(0, f"It is an animation or has pages: the first of {frames} was taken.")
    return Upload(image=upright, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """
    What a tokenizer makes of an image.

    Args:
        original (`PIL.Image.Image`): The square that the tokenizer sees.
        reconstruction (`PIL.Image.Image`): What it decodes its tokens to.
        difference (`PIL.Image.Image`): Where they differ, the mean over colors; light is `largest_difference`.
        largest_difference (`int`): The largest of these, in levels of 255.
        psnr (`float`): Peak signal-to-noise ratio of the 8-bit images in dB, `inf` if they are equal.
        latent (`torch.Tensor` of shape `(num_tokens, channels)`): The tokens, raw, on the CPU.
        notes (`tuple[str, ...]`): What was unusual about the image, in sentences.
    """

    original: Image.Image
    reconstruction: Image.Image
    difference: Image.Image
    largest_difference: int
    psnr: float
    latent: torch.Tensor
    notes: tuple[str, ...]


def _as_images(pixels: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(one.numpy()) for one in to_uint8(pixels)]


def encode_upload(pipe: MAETokDiffusionPipeline, upload: Upload) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of an image; of a Gaussian posterior, its mode.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, whose tokenizer is used.
        upload ([`Upload`]): The image.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The square that the tokenizer sees, uint8 of shape `(1, 3, size, size)` on
        the CPU, and the raw tokens of shape `(1, num_tokens, channels)` on the tokenizer's device.

    Raises:
        ValueError: If the tokenizer takes other images than colored ones.
    """
    pixels = ImageTransform(pipe.vae.config.sample_size).to_uint8(upload.image).unsqueeze(0)
    return pixels, encode_grid(pipe.vae, to_pixel_values(pixels, pipe.vae.device, pipe.vae.dtype))


@torch.no_grad()
def decode_raw(pipe: MAETokDiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """
    Pixels of raw tokens.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, whose tokenizer is used.
        latents (`torch.Tensor` of shape `(n, num_tokens, channels)`): Raw tokens.

    Returns:
        `torch.Tensor` of shape `(n, channels, size, size)`: float32 in about `[-1, 1]`, on the CPU.
    """
    vae = pipe.vae
    parts = latents.to(vae.device, vae.dtype).split(TOKEN_BATCH)
    return torch.cat([vae.decode(part, return_dict=False)[0].float().cpu() for part in parts])


def reconstruct(pipe: MAETokDiffusionPipeline, upload: Upload) -> Reconstruction:
    """
    Encode and decode an image, its centre square in the size of the model.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, whose tokenizer is used.
        upload ([`Upload`]): The image.

    Returns:
        [`Reconstruction`]: What came of it.

    Raises:
        ValueError: If the tokenizer takes other images than colored ones.
        FloatingPointError: If the reconstruction is not finite.
    """
    pixels, latents = encode_upload(pipe, upload)
    # rounded to 8 bits before it is measured, as in an evaluation
    rounded = to_uint8(decode_raw(pipe, latents)).permute(0, 3, 1, 2)
    difference = (rounded.float() - pixels.float()).abs().mean(dim=1)[0].numpy()
    psnr = peak_signal_to_noise_ratio(to_pixel_values(rounded), to_pixel_values(pixels)).item()
    names = size_names(upload.image.size, pipe.vae.config.sample_size)
    return Reconstruction(
        original=Image.fromarray(pixels[0].permute(1, 2, 0).numpy()),
        reconstruction=Image.fromarray(rounded[0].permute(1, 2, 0).numpy()),
        difference=heat_map(difference, difference.max()),
        largest_difference=round(difference.max()),
        psnr=psnr,
        latent=latents[0].cpu(),
        notes=(*upload.notes, *(NOTES[name] for name in names)),
    )


def format_psnr(psnr: float) -> str:
    """
    Args:
        psnr (`float`): In dB.

    Returns:
        `str`: In words.
    """
    return "no difference at all" if math.isinf(psnr) else f"{psnr:.2f} dB PSNR"


def seen_by_generator(pipe: MAETokDiffusionPipeline, latent: torch.Tensor) -> torch.Tensor:
    """
    The tokens as the generator sees them.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        latent (`torch.Tensor` of shape `(num_tokens, channels)`): Raw tokens.

    Returns:
        `torch.Tensor`: The same, normalised.
    """
    return normalize_latents(latent.unsqueeze(0), pipe.vae.config)[0]


@torch.no_grad()
def token_effects(pipe: MAETokDiffusionPipeline, latent: torch.Tensor) -> Iterator[np.ndarray]:
    """
    Where each token shows in the picture: how much a pixel changes when the token is replaced by the mean token.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, whose tokenizer is used.
        latent (`torch.Tensor` of shape `(num_tokens, channels)`): Raw tokens of an image.

    Yields:
        `np.ndarray` of shape `(n, size, size)`: For the next n tokens, the mean change over colors, in levels of 255.
    """
    latent = latent.float().cpu()
    mean = torch.as_tensor(pipe.vae.config["latents_mean"], dtype=torch.float32)
    whole = to_uint8(decode_raw(pipe, latent.unsqueeze(0))).float()
    for indices in torch.arange(len(latent)).split(TOKEN_BATCH):
        without = latent.repeat(len(indices), 1, 1)
        without[torch.arange(len(indices)), indices] = mean
        changed = to_uint8(decode_raw(pipe, without)).float()
        yield (changed - whole).abs().mean(dim=3).numpy()


def token_maps(effects: np.ndarray) -> list[tuple[Image.Image, str]]:
    """
    A picture for each token, all with the same scale of colors.

    Args:
        effects (`np.ndarray` of shape `(num_tokens, size, size)`): From [`token_effects`].

    Returns:
        `list[tuple[PIL.Image.Image, str]]`: Pictures with their captions, in the order of the tokens.
    """
    # one pixel that changes much must not make all others dark
    largest = float(np.quantile(effects, 0.999))
    return [(heat_map(effect, largest), f"token {index}: {effect.mean():.1f}") for index, effect in enumerate(effects)]
