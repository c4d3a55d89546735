"""Class labels as users give them: indices and names, single or in nested lists."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def check_id2label(id2label: Any) -> dict[int, str] | None:
    """
    Class names with integer keys, which JSON turns into strings.

    Args:
        id2label (`dict`, *optional*): Names by class index.

    Returns:
        `dict[int, str]` or `None`: The same with integer keys.

    Raises:
        ValueError: If it does not map class indices to names.
    """
    if id2label is None:
        return None
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` must map class indices to names, such as {{0: 'tench'}}, got {id2label!r}.")
    for index, name in id2label.items():
        if re.fullmatch(r"\d+", str(index)) is None or not isinstance(name, str):
            raise ValueError(f"`id2label` must map class indices to names, but has the entry {index!r}: {name!r}.")
    return {int(index): name for index, name in id2label.items()}


def classes_by_name(id2label: Mapping[int, str] | None) -> dict[str, list[int]]:
    """
    Every class name and every comma-separated synonym with the classes that bear it.

    Args:
        id2label (`dict[int, str]`, *optional*): Names by class index.

    Returns:
        `dict[str, list[int]]`: Empty without `id2label`.
    """
    classes: dict[str, list[int]] = {}
    for index, names in (id2label or {}).items():
        # a name without synonyms is its own only synonym
        for name in dict.fromkeys([names.strip(), *map(str.strip, names.split(","))]):
            classes.setdefault(name, []).append(int(index))
    return classes


def find_class(name: Any, classes: Mapping[str, list[int]]) -> int:
    """
    The class of a name.

    Args:
        name (`str`): A name or a synonym.
        classes (`dict[str, list[int]]`): From [`classes_by_name`].

    Returns:
        `int`: Its index.

    Raises:
        ValueError: If there are no names at all, or the name is unknown or borne by several classes.
    """
    if not classes:
        raise ValueError(
            f"the class name {name!r} needs `id2label`, which this pipeline does not have: pass the class "
            "index, or build the pipeline with names, `MAETokDiffusionPipeline(..., id2label={0: 'tench'})`."
        )
    found = classes.get(name.strip(), []) if isinstance(name, str) else []
    if not found:
        similar = difflib.get_close_matches(str(name), classes, n=3)
        hint = f"did you mean {' or '.join(map(repr, similar))}?" if similar else "see `pipe.labels`."
        raise ValueError(f"{name!r} is not a class name of this pipeline: {hint}")
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of classes {found}: pass the index of the one you mean.")
    return found[0]


def flatten_labels(class_labels: Any) -> list[int | str]:
    """
    Indices and names of any accepted form of labels, in order.

    Args:
        class_labels (`int`, `str`, `list`, `torch.Tensor` or `np.ndarray`): Labels, or nested sequences of them.

    Returns:
        `list[int | str]`: A flat list.

    Raises:
        ValueError: If anything is neither an index nor a name.
    """
    if isinstance(class_labels, str):
        return [class_labels]
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        return flatten_labels(class_labels.tolist())
    if isinstance(class_labels, (list, tuple, range)):
        return [label for entry in class_labels for label in flatten_labels(entry)]
    if isinstance(class_labels, (int, np.integer)) and not isinstance(class_labels, bool):
        return [int(class_labels)]
    raise ValueError(
        f"`class_labels` must hold class indices (integers) or names, got {class_labels!r} of "
        f"{type(class_labels).__name__}."
    )
