"""What a number was measured with: without it, it cannot be compared."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .extractors import FeatureExtractor, extractor_identity


UNKNOWN = "not stated"
DIGEST_LENGTH = 12
CENTER_CROP = "resized and cropped at the centre as ADM does"


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """
    The conditions of an evaluation, to be printed and stored with every number of it.

    Images from elsewhere say nothing of how they were made: what is not known is said to be so.

    Args:
        extractor (`str`): Name of the network that gives features.
        extractor_digest (`str`): Of its weights.
        resize (`str`): How it brings images to its size.
        reference (`str`): What the images are compared with.
        images (`str`, *optional*): What was scored.
        num_images (`int`): Images that were scored.
        num_reference_images (`int`, *optional*): Images of the reference; `None` where its file does not say.
        size (`str`, *optional*): Height and width of the images in pixels.
        crop (`str`, *optional*): How images of a data set got that size; `"none"` for images as they are.
        kid_subsets (`str`, *optional*): Number and size of KID's subsets, if it was computed over subsets.
        weights (`str`, *optional*): Digests of the networks that made the images.
        seed (`int`, *optional*): Seed of the images.
        labels (`str`, *optional*): How classes were drawn: FID is about 0.1 lower with as many images of each.
        sampler (`str`, *optional*): Name of the solver, with its shift of time if it has one.
        num_inference_steps (`int`, *optional*): Its steps.
        guidance (`str`, *optional*): Method, scale and interval.
        dtype (`str`, *optional*): Precision of the networks that made the images.
        rounding (`str`, *optional*): From their outputs to 8 bits.

    Raises:
        ValueError: If a number of images is not positive.
    """

    extractor: str
    extractor_digest: str
    resize: str
    reference: str
    images: str = UNKNOWN
    num_images: int
    num_reference_images: int | None = None
    size: str = UNKNOWN
    crop: str = UNKNOWN
    kid_subsets: str = "none"
    weights: str = UNKNOWN
    seed: int | None = None
    labels: str = UNKNOWN
    sampler: str = UNKNOWN
    num_inference_steps: int | None = None
    guidance: str = UNKNOWN
    dtype: str = UNKNOWN
    rounding: str = UNKNOWN

    def __post_init__(self):
        for name in ("num_images", "num_reference_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @classmethod
    def of(
        cls,
        extractor: FeatureExtractor,
        reference: str,
        num_images: int,
        num_reference_images: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **conditions: Any,
    ) -> "EvaluationProtocol":
        """
        The protocol of a set.

        Args:
            extractor ([`FeatureExtractor`]): What gives features.
            reference (`str`): What the images are compared with.
            num_images (`int`): Images that are scored.
            num_reference_images (`int`, *optional*): Images of the reference.
            settings (`Mapping[str, Any]`, *optional*): The `settings` in the `settings.json` of a set that
                `examples/generate.py` made.
            **conditions (`Any`): Further fields that are known, such as `images` and `size`.

        Returns:
            [`EvaluationProtocol`]: With what is known.
        """
        return cls(
            **extractor_identity(extractor),
            reference=reference,
            num_images=num_images,
            num_reference_images=num_reference_images,
            **conditions,
            **_sampling_of(settings or {}, num_images),
        )

    def to_dict(self) -> dict[str, Any]:
        """All conditions by name, plain types."""
        return asdict(self)

    def line(self) -> str:
        """
        All conditions in one line, to be printed under a number.

        Returns:
            `str`: `name value` of each, separated by semicolons; the digest is shortened.
        """
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "extractor_digest":
                value = value[:DIGEST_LENGTH]
            parts.append(f"{field.name.replace('_', ' ')} {UNKNOWN if value is None else value}")
        return "; ".join(parts)


def without_folders(description: str) -> str:
    """
    What is written into reports, for others to read.

    Args:
        description (`str`): Words, among them paths on this machine.

    Returns:
        `str`: The same with the last part of each path alone.
    """
    # in quotes, where they may have spaces in them, or a word without
    paths = r"""'(/[^']*)'|"(/[^"]*)"|(?<!\S)(/\S*)"""
    return re.sub(paths, lambda found: os.path.basename(next(filter(None, found.groups())).rstrip("/")), description)


def _sampling_of(settings: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    if not settings:
        return {}
    guidance = settings["guidance_method"]
    if guidance != "none":
        low, high = settings["guidance_interval"]
        guidance = f"{guidance} {settings['guidance_scale']} in [{low}, {high}]"
    classes = settings["class_labels"]
    chosen = "all" if classes == "all" else len(classes)
    scheduler = settings["scheduler"]
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    shifted = "" if shift == 1 else f", time shift {shift:g}"
    part = "" if num_images == settings["num_images"] else f", the first images of {settings['num_images']}"
    return {
        "labels": f"{settings['label_draw']}, {chosen} classes of {settings['num_classes']}{part}",
        "sampler": f"{scheduler['name']}{shifted}",
        "seed": settings["seed"],
        "weights": ", ".join(f"{name} {digest[:DIGEST_LENGTH]}" for name, digest in settings["digests"].items()),
        "num_inference_steps": settings["num_inference_steps"],
        "guidance": guidance,
        "dtype": settings["dtype"],
        "rounding": settings["rounding"],
    }
