"""The authors' published MAETok checkpoints: names, recommended sampling, and the numbers that the paper gives them.

Nothing here was measured with this library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedTokenizer:
    """
    A tokenizer of the authors.

    Args:
        repo_id (`str`): Repository on the Hub.
        name (`str`): Name in the authors' tables.
        card_name (`str`): Name of its card here, and of the folder that its example converts into.
        sample_size (`int`): Side in pixels.
        metrics (`Mapping[str, float]`): Published numbers on the 50 000 validation images of ImageNet.
    """

    repo_id: str
    name: str
    card_name: str
    sample_size: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class PublishedTransformer:
    """
    A generator of the authors, and the tokenizer of its latents.

    Args:
        repo_id (`str`): Repository on the Hub.
        tokenizer (`str`): Repository of the tokenizer.
        card_name (`str`): Name of its card here, and of the folder that its example converts into.
        guidance_scale (`float`): Recommended scale of classifier-free guidance.
        guidance_interval (`tuple[float, float]`): Times in which it applies.
        metrics (`Mapping[str, float]`): Published numbers of 50 000 samples with guidance.
        unguided_metrics (`Mapping[str, float]`): The same without guidance.
    """

    repo_id: str
    tokenizer: str
    card_name: str
    guidance_scale: float
    guidance_interval: tuple[float, float]
    metrics: Mapping[str, float]
    unguided_metrics: Mapping[str, float] = field(default_factory=dict)


NUM_INFERENCE_STEPS = 250
TOKENIZERS = {
    tokenizer.repo_id: tokenizer
    for tokenizer in (
        PublishedTokenizer(
            repo_id="MAETok/maetok-b-128",
            name="MAETok-B-128",
            card_name="maetok-b-128-256",
            sample_size=256,
            metrics={"rfid": 0.48, "psnr": 23.61, "ssim": 0.763},
        ),
        PublishedTokenizer(
            repo_id="MAETok/maetok-b-512",
            name="MAETok-B-128-512",
            card_name="maetok-b-128-512",
            sample_size=512,
            metrics={"rfid": 0.62},
        ),
    )
}
TRANSFORMERS = {
    transformer.repo_id: transformer
    for transformer in (
        PublishedTransformer(
            repo_id="MAETok/sit-xl_maetok-b-128",
            tokenizer="MAETok/maetok-b-128",
            card_name="sit-xl-maetok-b-128-256",
            guidance_scale=1.9,
            guidance_interval=(0.0, 0.75),
            metrics={"fid": 1.67},
            unguided_metrics={"fid": 2.31, "inception_score": 216.5},
        ),
        PublishedTransformer(
            repo_id="MAETok/sit-xl_maetok-b-128-512",
            tokenizer="MAETok/maetok-b-512",
            card_name="sit-xl-maetok-b-128-512",
            guidance_scale=1.5,
            guidance_interval=(0.0, 0.7),
            metrics={"fid": 1.69},
            unguided_metrics={"fid": 2.79},
        ),
    )
}


def recommended_guidance(sample_size: int, transformer: str | None = None) -> tuple[float, tuple[float, float]]:
    """
    Scale and interval of classifier-free guidance that the paper recommends.

    Args:
        sample_size (`int`): Side of the images in pixels.
        transformer (`str`, *optional*): Repository of the generator.

    Returns:
        `tuple[float, tuple[float, float]]`: Those of the published generator of that name, else of the one whose
        images have that size, else of the one at 256 pixels.
    """
    by_size = {TOKENIZERS[known.tokenizer].sample_size: known for known in TRANSFORMERS.values()}
    found = TRANSFORMERS.get(transformer or "") or by_size.get(sample_size) or by_size[256]
    return found.guidance_scale, found.guidance_interval


def check_pair(tokenizer: str, transformer: str) -> None:
    """
    Refuse a published generator with another published tokenizer than its own: their latents have the same shape, so
    that nothing else would notice.

    Args:
        tokenizer (`str`): Name of the tokenizer.
        transformer (`str`): Name of the generator.

    Raises:
        ValueError: If they are published, and not for each other.
    """
    known = TRANSFORMERS.get(transformer)
    if known is not None and tokenizer in TOKENIZERS and tokenizer != known.tokenizer:
        raise ValueError(
            f"{transformer} was trained on latents of {known.tokenizer}, not of {tokenizer}: images would be noise."
        )
