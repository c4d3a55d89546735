"""From the decoder's numbers to 8-bit pixels, which is part of an evaluation's protocol."""

import torch


# what is added to 127.5 x before the fraction is cut off
ROUNDING_OFFSETS = {"nearest": 128.0, "truncate": 127.5}


def to_uint8(images: torch.Tensor, rounding: str = "nearest") -> torch.Tensor:
    """
    8-bit images.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in `[-1, 1]`, of 3 channels or
            of one, which becomes grey; what lies outside is clamped.
        rounding (`str`, *optional*, defaults to `"nearest"`):
            `"nearest"` is `floor(127.5 x + 128)`, the code of DiT and SiT. `"truncate"` is `floor(127.5 x + 127.5)`,
            the code of ADM (guided diffusion): on average half a level darker, which shifts a FID.

    Returns:
        `torch.ByteTensor` of shape `(batch_size, height, width, 3)` on the CPU.

    Raises:
        ValueError: If `rounding` is neither.
        FloatingPointError: If an image is not finite, as the outputs of models in float16 may be.
    """
    if rounding not in ROUNDING_OFFSETS:
        raise ValueError(f"`rounding` must be one of {', '.join(map(repr, ROUNDING_OFFSETS))}, got {rounding!r}.")
    if not bool(images.isfinite().all()):
        raise FloatingPointError("a generated image is not finite: use `dtype` 'float32' or 'bfloat16'.")
    # in bfloat16 the sum would have steps of a whole level
    levels = (127.5 * images.float() + ROUNDING_OFFSETS[rounding]).clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().contiguous()
