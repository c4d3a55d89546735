"""From any PIL image to a tensor in [-1, 1]: the only colour conversion and the only crop code of the library."""

import math
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


CROPS = ("center", "random")

# An image longer than this many times its short side is first cut to the ratio around its centre: enlarging a
# 1 x 10000 strip until its short side fills the target would otherwise need gigabytes.
MAX_ASPECT_RATIO = 16

# The released code's random crop takes between 0.8 and 1.0 of the short side.
MIN_CROP_FRACTION = 0.8

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, OverflowError):
        # The pixels of an image with an unreadable EXIF block are fine; such a block names no orientation.
        return image
    return image if orientation == 1 else PIL.ImageOps.exif_transpose(image)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Turn a PIL image of any mode into an upright 8-bit RGB image.

    The EXIF orientation is applied. Transparency (an alpha channel or a transparent colour) is composited on white.
    16-bit grey values are scaled to 8 bits; mode `I` is read as 16-bit data, because that is what decoders put there.

    Args:
        image (`PIL.Image.Image`): An image of any mode and size.

    Returns:
        `PIL.Image.Image`: An image of mode `RGB`.
    """
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = PIL.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "LAB":
        # PIL has no direct conversion from LAB; littlecms is a part of PIL's wheels.
        from PIL import ImageCms

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _limit_aspect_ratio(image: PIL.Image.Image) -> PIL.Image.Image:
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def resize_short_side(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    Resize so that the short side is `size` pixels, as ADM does: the image is halved by box averaging while its short
    side is at least twice the target, then resized once by bicubic interpolation. Smaller images are enlarged.

    Args:
        image (`PIL.Image.Image`): An image of mode `RGB`.
        size (`int`): Short side of the result in pixels.

    Returns:
        `PIL.Image.Image`: The resized image.
    """
    image = _limit_aspect_ratio(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    new_size = (round(image.width * scale), round(image.height * scale))
    return image if new_size == image.size else image.resize(new_size, resample=PIL.Image.Resampling.BICUBIC)


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """
    Args:
        image (`PIL.Image.Image`): An image of mode `RGB`, `width` x `height`.

    Returns:
        `torch.Tensor`: `x / 127.5 - 1` as float32 in `[-1, 1]`, of shape `(3, height, width)`.
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


class ImageTransform:
    """
    Crop, flip and convert one image. Every draw comes from the generator of the call, so a sample's crop and flip are
    a function of the generator's key alone.

    Args:
        resolution (`int`): Height and width of the result in pixels.
        crop (`str`, *optional*, defaults to `"center"`): `"center"` resizes the short side to `resolution` as ADM
            does (see [`resize_short_side`]) and cuts the centre. `"random"`, the released code's variant, cuts a
            random square of 0.8 to 1.0 of the short side.
        random_flip (`bool`, *optional*, defaults to `False`): Mirror left and right with probability one half.

    Raises:
        ValueError: If `resolution` is not a positive integer or `crop` is unknown.
    """

    def __init__(self, resolution: int, crop: str = "center", random_flip: bool = False):
        if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
            raise ValueError(f"`resolution` must be a positive integer, got {resolution!r}.")
        if crop not in CROPS:
            raise ValueError(f"`crop` must be one of {', '.join(map(repr, CROPS))}, got {crop!r}.")
        self.resolution = resolution
        self.crop = crop
        self.random_flip = random_flip

    def __repr__(self) -> str:
        return f"ImageTransform({self.resolution}, crop={self.crop!r}, random_flip={self.random_flip})"

    @property
    def is_random(self) -> bool:
        """Whether a call draws anything."""
        return self.crop == "random" or self.random_flip

    def __call__(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        Args:
            image (`PIL.Image.Image`): An image of any mode and size; see [`to_rgb`].
            generator (`torch.Generator`, *optional*): Source of the draws. Needed for a random crop or flip.

        Returns:
            `torch.Tensor`: float32 in `[-1, 1]`, of shape `(3, resolution, resolution)`.

        Raises:
            ValueError: If the transform is random and no generator is given.
        """
        if self.is_random and generator is None:
            raise ValueError(f"{self} draws random numbers: pass `generator`, for example from `keyed_generator`.")
        image = to_rgb(image)
        # The number and order of the draws is fixed, so that switching the flip off leaves the crops unchanged.
        draws = torch.rand(4, generator=generator).tolist() if self.is_random else [0.0] * 4
        if self.crop == "random":
            largest = math.ceil(self.resolution / MIN_CROP_FRACTION)
            image = resize_short_side(image, self.resolution + int(draws[0] * (largest - self.resolution + 1)))
            left = int(draws[1] * (image.width - self.resolution + 1))
            top = int(draws[2] * (image.height - self.resolution + 1))
        else:
            image = resize_short_side(image, self.resolution)
            left, top = (image.width - self.resolution) // 2, (image.height - self.resolution) // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        if self.random_flip and draws[3] < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return image_to_tensor(image)
