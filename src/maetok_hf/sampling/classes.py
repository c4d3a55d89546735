"""Which class each image of a set has."""

from collections.abc import Iterable, Sequence

import torch

from ..pipelines import MAETokDiffusionPipeline
from ..seeding import keyed_generator


ALL_CLASSES = "all"


def select_classes(words: Iterable[str], pipe: MAETokDiffusionPipeline) -> list[int]:
    """
    The classes that the words of a command line name.

    A word is `"all"`, a class index, a class name of the pipeline, or several indices and names between commas.

    Args:
        words (`Iterable[str]`): The words.
        pipe ([`MAETokDiffusionPipeline`]): It knows the number of classes, and their names if it has any.

    Returns:
        `list[int]`: Class indices in the order of the words.

    Raises:
        ValueError: If there is no word, `"all"` is not the only one, a class is unknown or named twice, or a number is
            an index and also the name of another class.
    """
    words = list(words)
    num_classes = pipe.transformer.config.num_classes
    if not words:
        raise ValueError("`class_labels` names no class: give 'all', class indices, or class names.")
    if words == [ALL_CLASSES]:
        return list(range(num_classes))
    # a full name may contain commas, which separate its synonyms
    parts = [part for word in words for part in ([word] if word.strip() in pipe.labels else word.split(","))]
    if ALL_CLASSES in parts:
        raise ValueError(f"`class_labels` must be 'all' or name classes, not both, got {' '.join(words)!r}.")
    classes = [_class_of(part.strip(), pipe) for part in parts]
    unknown = [index for index in classes if not 0 <= index < num_classes]
    if unknown:
        raise ValueError(f"`class_labels` must lie in [0, {num_classes - 1}] for this model, got {unknown}.")
    repeated = sorted({index for index in classes if classes.count(index) > 1})
    if repeated:
        raise ValueError(f"`class_labels` names the classes {repeated} more than once: name each class once.")
    return classes


def _class_of(word: str, pipe: MAETokDiffusionPipeline) -> int:
    if not word.removeprefix("-").isdecimal():
        return pipe.get_label_ids(word)[0]
    named = pipe.labels.get(word, [])
    if named and named != [int(word)]:
        raise ValueError(
            f"`class_labels`: {word!r} may mean class {word} or the class of that name, {named}: give the full name "
            "or a synonym."
        )
    return int(word)


def draw_labels(num_images: int, classes: Sequence[int], label_draw: str, seed: int) -> torch.Tensor:
    """
    The class of every image of a set.

    Args:
        num_images (`int`): Images of the set.
        classes (`Sequence[int]`): Classes to choose from.
        label_draw (`str`):
            `"balanced"` takes the classes in turn, so that they have equally many images, up to one: if `num_images`
            is not a multiple of the number of classes, the first ones have one more. `"random"` draws each label
            uniformly, keyed by `(seed, index of the image)`.
        seed (`int`): Seed of the set.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`.
    """
    classes = torch.tensor(list(classes))
    if label_draw == "balanced":
        return classes[torch.arange(num_images) % len(classes)]
    generators = (keyed_generator(seed, "sampling label", index) for index in range(num_images))
    return classes[torch.cat([torch.randint(len(classes), (1,), generator=generator) for generator in generators])]


def describe_counts(num_images: int, num_classes: int, label_draw: str) -> str:
    """How many images each class has, in words, for [`draw_labels`] of these arguments."""
    among = "1 class" if num_classes == 1 else f"{num_classes} classes"
    if label_draw == "random":
        return f"{num_images} images, the class of each drawn at random from {among}"
    each, more = divmod(num_images, num_classes)
    text = f"{num_images} images of {among}, {each} each"
    return f"{text}, and one more of the first {more}" if more else text
