"""From any PIL image to a tensor: the only color conversion and the only crop code of the library.

Images stay 8-bit until they are on the device that uses them: [`to_pixel_values`] then makes them floats in [-1, 1].
"""

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

# Decoding an image with more pixels takes a good part of a second and of a gigabyte, which is worth a note.
HUGE_PIXELS = 2**25

# The released code's random crop takes between 0.8 and 1.0 of the short side.
MIN_CROP_FRACTION = 0.8

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# What a mode is counted as; one that is not named here is some other color space.
_MODE_NAMES = {
    **dict.fromkeys(("RGB", "RGBA", "RGBa", "RGBX")),
    **dict.fromkeys(("1", "L", "LA", "La"), "grayscale"),
    **dict.fromkeys(("P", "PA"), "palette"),
    **dict.fromkeys(_SIXTEEN_BIT_MODES, "sixteen_bit"),
    "CMYK": "cmyk",
}
_EXIF_ORIENTATION = 0x0112


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, OverflowError):
        # The pixels of an image with an unreadable EXIF block are fine; such a block names no orientation.
        return image
    return image if orientation == 1 else PIL.ImageOps.exif_transpose(image)


def convert_to_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """
    As [`to_rgb`], and says what was unusual.

    Args:
        image (`PIL.Image.Image`): An image of any mode and size.

    Returns:
        `tuple[PIL.Image.Image, tuple[str, ...]]`: An image of mode `RGB`, and the names of `COUNT_NAMES` for what had
        to be done to it.
    """
    names = []
    upright = _upright(image)
    if upright is not image:
        image = upright
        names.append("rotated")
    mode_name = _MODE_NAMES.get(image.mode, "other_mode")
    if mode_name is not None:
        names.append(mode_name)
    if image.width * image.height > HUGE_PIXELS:
        names.append("huge")
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = PIL.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "LAB":
        # PIL has no direct conversion from LAB; littlecms is a part of PIL's wheels.
        from PIL import ImageCms

        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        names.append("transparent")
        image = image.convert("RGBA")
        background = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB"), tuple(names)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Turn a PIL image of any mode into an upright 8-bit RGB image.

    The EXIF orientation is applied. Transparency (an alpha channel or a transparent color) is composited on white.
    16-bit gray values are scaled to 8 bits; mode `I` is read as 16-bit data, because that is what decoders put there.

    Args:
        image (`PIL.Image.Image`): An image of any mode and size.

    Returns:
        `PIL.Image.Image`: An image of mode `RGB`.
    """
    return convert_to_rgb(image)[0]


def size_names(size: tuple[int, int], resolution: int) -> tuple[str, ...]:
    """
    What [`ImageTransform`] has to do to an image because of its size.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        resolution (`int`): Height and width it is brought to.

    Returns:
        `tuple[str, ...]`: Names of `COUNT_NAMES`.
    """
    names = []
    if min(size) < resolution:
        names.append("enlarged")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        names.append("elongated")
    return tuple(names)


def _limit_aspect_ratio(image: PIL.Image.Image) -> PIL.Image.Image:
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _halved(image: PIL.Image.Image, size: int) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """The image before the last step of resizing, and the size it gets in that step."""
    image = _limit_aspect_ratio(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


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
    image, new_size = _halved(image, size)
    return image if new_size == image.size else image.resize(new_size, resample=PIL.Image.Resampling.BICUBIC)


def to_pixel_values(
    images: torch.Tensor, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    Make the floats that models take from 8-bit images: `x / 127.5 - 1`. The 8-bit images are what is moved to the
    device, a quarter of the bytes, and without waiting if they are in pinned memory.

    Args:
        images (`torch.Tensor`): uint8, of any shape, such as the `images` of a batch.
        device (`torch.device` or `str`, *optional*): Where the result shall be; by default where `images` are.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the result; computed in float32.

    Returns:
        `torch.Tensor`: In `[-1, 1]`, of the shape of `images`.

    Raises:
        ValueError: If `images` are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"`images` must be uint8 in [0, 255], got {images.dtype}: pass them as they were loaded.")
    return images.to(device=device, non_blocking=True).to(torch.float32).div_(127.5).sub_(1.0).to(dtype)


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
        return to_pixel_values(self.to_uint8(image, generator))

    def to_uint8(self, image: PIL.Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        The 8-bit pixels that a call makes floats of.

        Args:
            image (`PIL.Image.Image`): An image of any mode and size; see [`to_rgb`].
            generator (`torch.Generator`, *optional*): Source of the draws. Needed for a random crop or flip.

        Returns:
            `torch.Tensor`: uint8 in `[0, 255]`, of shape `(3, resolution, resolution)`.

        Raises:
            ValueError: If the transform is random and no generator is given.
        """
        pixels = torch.empty(3, self.resolution, self.resolution, dtype=torch.uint8)
        self.write(image, pixels, generator)
        return pixels

    def write(self, image: PIL.Image.Image, out: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """
        As [`~ImageTransform.to_uint8`], into a given place.

        Args:
            image (`PIL.Image.Image`): An image of any mode and size; see [`to_rgb`].
            out (`torch.Tensor`): uint8 of shape `(3, resolution, resolution)`, contiguous.
            generator (`torch.Generator`, *optional*): Source of the draws. Needed for a random crop or flip.

        Raises:
            ValueError: If the transform is random and no generator is given.
        """
        if self.is_random and generator is None:
            raise ValueError(f"{self} draws random numbers: pass `generator`, for example from `keyed_generator`.")
        # The number and order of the draws is fixed, so that switching the flip off leaves the crops unchanged.
        draws = torch.rand(4, generator=generator).tolist() if self.is_random else [0.0] * 4
        short_side = self.resolution
        if self.crop == "random":
            largest = math.ceil(self.resolution / MIN_CROP_FRACTION)
            short_side += int(draws[0] * (largest - self.resolution + 1))
        image, (width, height) = _halved(to_rgb(image), short_side)
        if self.crop == "random":
            left = int(draws[1] * (width - self.resolution + 1))
            top = int(draws[2] * (height - self.resolution + 1))
        else:
            left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        # PIL resizes the rows first and then the columns. In two steps that gives the same pixels, without computing
        # columns that are cut off.
        image = image.resize((width, image.height), resample=PIL.Image.Resampling.BICUBIC)
        image = image.crop((left, 0, left + self.resolution, image.height))
        image = image.resize((self.resolution, height), resample=PIL.Image.Resampling.BICUBIC)
        image = image.crop((0, top, self.resolution, top + self.resolution))
        if self.random_flip and draws[3] < 0.5:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        for channel, plane in zip("RGB", out.numpy(), strict=True):
            # One channel at a time takes a quarter of the time of an interleaved array that is then transposed.
            plane[:] = np.frombuffer(image.tobytes("raw", channel), dtype=np.uint8).reshape(plane.shape)
