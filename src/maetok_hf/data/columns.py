"""Which columns of a data set hold the image, the class and the caption, and what the classes are called."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


IMAGE_COLUMN_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMN_NAMES = ("label", "labels", "class", "class_label", "cls", "target")


@dataclass(frozen=True)
class ImageColumns:
    """
    The columns that are read.

    Args:
        image (`str`): Name of the image column.
        label (`str`, *optional*): Name of the class column, `None` if no classes are read.
        class_names (`tuple[str, ...]`, *optional*): Names of the classes in the order of their indices, `None` if the
            data set does not know them.
        caption (`str`, *optional*): Name of the caption column, `None` if no captions are read.
        caption_fields (`tuple[str, ...]`, *optional*, defaults to `()`): Where the caption is inside that column, if
            it holds structs or JSON objects.
    """

    image: str
    label: str | None = None
    class_names: tuple[str, ...] | None = None
    caption: str | None = None
    caption_fields: tuple[str, ...] = ()
    _index_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_index_of", {name: index for index, name in enumerate(self.class_names or ())})

    @property
    def names(self) -> list[str]:
        """The columns of the data set that must be read."""
        return list(dict.fromkeys(name for name in (self.image, self.label, self.caption) if name is not None))

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    @property
    def id2label(self) -> dict[int, str] | None:
        return None if self.class_names is None else dict(enumerate(self.class_names))

    def label_index(self, value: Any) -> int:
        """
        Class index of a stored label.

        Args:
            value (`Any`): What the label column holds: an integer, digits, or a class name.

        Returns:
            `int`: The index, or -1 for a label that is missing or is no class of this data set.
        """
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        if isinstance(value, str):
            value = self._index_of.get(value, value.strip())
        try:
            index = int(value)
        except (TypeError, ValueError, OverflowError):
            return -1
        if index != value and not isinstance(value, str):
            return -1
        return index if index >= 0 and (self.num_classes is None or index < self.num_classes) else -1

    def caption_text(self, value: Any) -> str | None:
        """
        Text of a stored caption.

        Args:
            value (`Any`): What the caption column holds: text, UTF-8 bytes, or the struct or JSON object around it.

        Returns:
            `str`, *optional*: The caption as it is stored, `None` if it is missing, blank or no text.
        """
        for field_name in self.caption_fields:
            if isinstance(value, str | bytes):
                try:
                    value = json.loads(value)
                except ValueError:
                    return None
            value = value.get(field_name) if isinstance(value, Mapping) else None
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        return value if isinstance(value, str) and value.strip() else None


def _is_image_feature(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _may_hold_image(feature: Any) -> bool:
    # Image files stored without the `Image` feature: bare bytes, a path, or the struct that the feature stores.
    if isinstance(feature, Mapping):
        return "bytes" in feature or "path" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _may_hold_label(feature: Any) -> bool:
    from datasets import ClassLabel

    return isinstance(feature, ClassLabel) or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _find_caption(features: Mapping[str, Any], name: str, columns: str) -> tuple[str, tuple[str, ...]]:
    """The column and the fields in it that a caption column such as `text` or `json.caption` names."""
    path = (name,) if name in features else tuple(name.split("."))
    found: Any = features
    for part in path:
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(
                f"`caption_column={name!r}` is not a column of the data set, nor a field of one as in 'json.caption'. "
                f"Columns: {columns}."
            )
        found = found[part]
    if getattr(found, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"`caption_column={name!r}` holds no text but {found}. Columns: {columns}.")
    return path[0], path[1:]


def _the_only(candidates: Iterable[str], what: str, argument: str, columns: str, help_: str = "") -> str | None:
    candidates = list(candidates)
    if len(candidates) > 1:
        raise ValueError(
            f"The {what} column is ambiguous: {', '.join(map(repr, candidates))}. Name one with `{argument}`"
            f"{help_}. Columns: {columns}."
        )
    return candidates[0] if candidates else None


def find_columns(
    features: Mapping[str, Any],
    image_column: str | None = None,
    label_column: str | None = None,
    use_labels: bool = True,
    caption_column: str | None = None,
) -> ImageColumns:
    """
    Find the image, class and caption columns of a data set.

    Args:
        features (`Mapping[str, Any]`): The features of the data set by column, as `dataset.features`.
        image_column (`str`, *optional*): Image column. Found if not given: the only column with an `Image` feature,
            else the only one with a usual name.
        label_column (`str`, *optional*): Class column. Found if not given: the only column with a `ClassLabel`
            feature, else the only integer column with a usual name, else none.
        use_labels (`bool`, *optional*, defaults to `True`): `False` reads no classes.
        caption_column (`str`, *optional*): Caption column, or `column.field` for a field of a column of structs or
            JSON objects. Captions are read only if it is given.

    Returns:
        [`ImageColumns`]: The columns and the names of the classes.

    Raises:
        ValueError: If a named column does not exist or cannot hold what it is named for, if no image column is found,
            or if several are equally good. The message lists the columns.
    """
    from datasets import ClassLabel

    columns = ", ".join(f"{name!r} ({feature})" for name, feature in features.items()) or "none"
    if not use_labels and label_column is not None:
        raise ValueError(f"`label_column={label_column!r}` is given although `use_labels` is False: drop one of them.")
    for argument, name in (("image_column", image_column), ("label_column", label_column)):
        if name is not None and name not in features:
            raise ValueError(f"`{argument}={name!r}` is not a column of the data set. Columns: {columns}.")

    if image_column is None:
        image_column = _the_only(
            (name for name, feature in features.items() if _is_image_feature(feature)),
            "image",
            "image_column",
            columns,
        ) or _the_only(
            (name for name in IMAGE_COLUMN_NAMES if name in features and _may_hold_image(features[name])),
            "image",
            "image_column",
            columns,
        )
        if image_column is None:
            raise ValueError(f"The data set has no image column; name one with `image_column`. Columns: {columns}.")
    elif not _is_image_feature(features[image_column]) and not _may_hold_image(features[image_column]):
        raise ValueError(f"`image_column={image_column!r}` holds no images. Columns: {columns}.")

    caption, caption_fields = None, ()
    if caption_column is not None:
        caption, caption_fields = _find_caption(features, caption_column, columns)
    if not use_labels:
        return ImageColumns(image_column, caption=caption, caption_fields=caption_fields)
    if label_column is None:
        without = ", or pass `use_labels=False`"
        label_column = _the_only(
            (name for name, feature in features.items() if isinstance(feature, ClassLabel)),
            "label",
            "label_column",
            columns,
            without,
        ) or _the_only(
            (name for name in LABEL_COLUMN_NAMES if name in features and _may_hold_label(features[name])),
            "label",
            "label_column",
            columns,
            without,
        )
    elif not _may_hold_label(features[label_column]):
        raise ValueError(
            f"`label_column={label_column!r}` holds no class indices (an integer or a `ClassLabel` column); "
            f"`dataset.class_encode_column({label_column!r})` makes them. Columns: {columns}."
        )
    feature = features[label_column] if label_column is not None else None
    names = tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else None
    return ImageColumns(image_column, label_column, names, caption, caption_fields)
