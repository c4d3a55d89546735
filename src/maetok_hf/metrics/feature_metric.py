"""What the modules for `evaluate` have in common: features, or images that become features when they are added."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import evaluate
import numpy as np
import torch

from ..data.sources import decode_image
from ..evaluation import FeatureExtractor


INPUTS = """
Args:
    predictions: Features of the generated images, one vector each, of any floating-point type; kept in float64. With
        an extractor, images: a uint8 torch tensor of shape (n, 3, height, width), a uint8 numpy array of shape
        (n, height, width, 3), or a list of paths, PIL images or arrays of one size.
    references: The same of the real images. There may be more or fewer of them, and they may be added separately.
"""


class FeatureMetric(evaluate.Metric, abc.ABC):
    """
    A module whose inputs are vectors, kept in `evaluate`'s cache file in the order in which they were added.

    Args:
        *args (`Any`): Of `evaluate.Metric`.
        extractor ([`~maetok_hf.evaluation.FeatureExtractor`], *optional*): Makes features of images; without one,
            features are what is added.
        batch_size (`int`, *optional*, defaults to 32): Images that the extractor takes at a time.
        **kwargs (`Any`): Of `evaluate.Metric`.

    Raises:
        ValueError: If `batch_size` is not positive.
    """

    layer = "pool"
    inputs: Sequence[str] = ("predictions", "references")
    description = ""
    usage = ""
    citation = ""
    reference_urls: Sequence[str] = ()

    def __init__(self, *args: Any, extractor: FeatureExtractor | None = None, batch_size: int = 32, **kwargs: Any):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
        super().__init__(*args, **kwargs)
        self.extractor, self.batch_size = extractor, batch_size

    def _info(self) -> evaluate.MetricInfo:
        from datasets import Features, Sequence, Value

        info = evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=INPUTS + self.usage,
            features=Features({name: Sequence(Value("float64")) for name in self.inputs}),
            reference_urls=list(self.reference_urls),
        )
        # Rows as Arrow has them, read from the cache file where they are needed: by default `evaluate` makes lists of
        # Python numbers, 3.3 GB for 50 000 vectors of 2048. Its constructor takes another format for scalars only.
        info.format = "arrow"
        return info

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Add some images or features. There may be more of one kind, or of one alone.

        Args:
            predictions (`Any`, *optional*): Of the generated images.
            references (`Any`, *optional*): Of the real ones.
            **kwargs (`Any`): Nothing; `evaluate` names what is wrong.

        Raises:
            ValueError: If they are not what the module was loaded for.
        """
        given = {"predictions": predictions, "references": references}
        rows = {name: self._rows(name, given[name]) for name in self.inputs}
        length = max(map(len, rows.values()))
        # rows that are missing on one side are null in the file
        padded = {name: [*values, *[None] * (length - len(values))] for name, values in rows.items()}
        evaluate.Metric.add_batch(self, **padded, **kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """
        Add one image or its features.

        Args:
            prediction (`Any`, *optional*): Of a generated image.
            reference (`Any`, *optional*): Of a real one.
            **kwargs (`Any`): Nothing; `evaluate` names what is wrong.
        """
        single = {"predictions": prediction, "references": reference}
        self.add_batch(**{name: None if value is None else [value] for name, value in single.items()}, **kwargs)

    @abc.abstractmethod
    def _compute(self, **inputs: Any) -> dict[str, float]: ...

    def _rows(self, name: str, values: Any) -> np.ndarray:
        if values is None or len(values) == 0:
            return np.empty((0, 0))
        if self.extractor is None:
            return _feature_rows(name, values)
        features = [self.extractor(images) for images in _image_batches(name, values, self.batch_size)]
        return torch.cat([layers[self.layer].cpu().double() for layers in features]).numpy()


def feature_blocks(name: str, column: Any) -> Iterator[torch.Tensor]:
    """
    The rows of an input, block by block.

    Args:
        name (`str`): Of the input, for messages.
        column (`pyarrow.ChunkedArray`): What `evaluate` gives to `_compute`.

    Yields:
        `torch.DoubleTensor` of shape `(n, dim)`: Some rows, not to be written to.

    Raises:
        ValueError: If there are none, or they differ in length.
    """
    dim = None
    for chunk in column.chunks:
        chunk = chunk.drop_null()
        if len(chunk) == 0:
            continue
        widths = np.unique(np.diff(chunk.offsets.to_numpy()))
        dim = dim or int(widths[0])
        if widths.tolist() != [dim]:
            raise ValueError(
                f"`{name}` has vectors of {dim} numbers and others of {widths.tolist()}: use one extractor."
            )
        # a copy, as Arrow's memory is read-only and torch warns of that
        yield torch.from_numpy(np.array(chunk.flatten())).reshape(len(chunk), dim)
    if dim is None:
        raise ValueError(f"`{name}` is empty: add features or images first.")


def feature_tensor(name: str, column: Any) -> torch.Tensor:
    """
    All rows of an input.

    Args:
        name (`str`): Of the input, for messages.
        column (`pyarrow.ChunkedArray`): What `evaluate` gives to `_compute`.

    Returns:
        `torch.DoubleTensor` of shape `(n, dim)`: In the order in which they were added.

    Raises:
        ValueError: If there are none, or they differ in length.
    """
    return torch.cat(list(feature_blocks(name, column)))


def _feature_rows(name: str, values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()  # numpy has no bfloat16
    try:
        rows = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(_not_features(name, str(error))) from error
    if rows.ndim != 2:
        raise ValueError(_not_features(name, f"shape {rows.shape}"))
    if not np.isfinite(rows).all():
        raise ValueError(f"`{name}` has features that are not finite: run the extractor in float32.")
    return rows


def _not_features(name: str, what: str) -> str:
    return (
        f"`{name}` must be feature vectors of shape (n, dim), got {what}: for images, load the module with an "
        "extractor, such as `evaluate.load(path, extractor=InceptionExtractor.from_file())` of `maetok_hf.evaluation`."
    )


def _image_batches(name: str, values: Any, batch_size: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(values), batch_size):
        part = values[start : start + batch_size]
        if isinstance(part, torch.Tensor):
            if part.dtype != torch.uint8 or part.ndim != 4 or part.shape[1] != 3:
                raise ValueError(
                    f"`{name}` must be images of uint8, as a tensor (n, 3, height, width), got {part.dtype} of shape "
                    f"{tuple(part.shape)}."
                )
            yield part
        else:
            yield torch.from_numpy(_pixels(name, part)).permute(0, 3, 1, 2).contiguous()


def _pixels(name: str, values: Any) -> np.ndarray:
    """uint8 of shape (n, height, width, 3)."""
    if not isinstance(values, np.ndarray):
        images = [np.asarray(decode_image(value)[0]) for value in values]
        sizes = {image.shape for image in images}
        if len(sizes) > 1:
            raise ValueError(f"`{name}` has images of shapes {sorted(sizes)}: bring them to one size first.")
        values = np.stack(images)
    if values.dtype != np.uint8 or values.ndim != 4 or values.shape[3] != 3:
        raise ValueError(
            f"`{name}` must be images of uint8, as an array (n, height, width, 3), got {values.dtype} of shape "
            f"{values.shape}."
        )
    return values
