"""What a number was measured with: without it, it cannot be compared."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .extractors import FeatureExtractor


UNKNOWN = "not stated"
DIGEST_LENGTH = 12


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
        num_images (`int`): Images that were scored.
        num_reference_images (`int`, *optional*): Images of the reference; `None` where its file does not say.
        labels (`str`, *optional*): How classes were drawn: FID is about 0.1 lower with as many images of each.
        sampler (`str`, *optional*): Name of the solver; for reconstructions what made them.
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
    num_images: int
    num_reference_images: int | None = None
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

        Returns:
            [`EvaluationProtocol`]: With what is known.
        """
        return cls(
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            resize=extractor.resize,
            reference=reference,
            num_images=num_images,
            num_reference_images=num_reference_images,
            **_sampling_of(settings or {}),
        )

    def feature_identity(self) -> dict[str, str]:
        """What statistics of features depend on besides the images, to be compared when they are read."""
        return {name: getattr(self, name) for name in ("extractor", "extractor_digest", "resize")}

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


def _sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    if not settings:
        return {}
    guidance = settings["guidance_method"]
    if guidance != "none":
        low, high = settings["guidance_interval"]
        guidance = f"{guidance} {settings['guidance_scale']} in [{low}, {high}]"
    classes = settings["class_labels"]
    chosen = "all" if classes == "all" else len(classes)
    return {
        "labels": f"{settings['label_draw']}, {chosen} classes of {settings['num_classes']}",
        "sampler": settings["scheduler"]["name"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance": guidance,
        "dtype": settings["dtype"],
        "rounding": settings["rounding"],
    }
