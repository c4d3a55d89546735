"""Names of ImageNet's classes, which the authors' generators know by index only."""


def imagenet_id2label() -> dict[int, str]:
    """
    The 1000 classes of ImageNet-1k in the order of their WordNet identifiers, which is that of the authors' labels.

    Returns:
        `dict[int, str]`: Names by index, synonyms separated by commas.

    Raises:
        ImportError: If `timm`, which ships the names, is not installed.
    """
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            f"The names of ImageNet's classes come with `timm` ({error}): install `maetok_hf[conversion]`, or go "
            "without them by `--id2label none`."
        ) from error
    info = ImageNetInfo("imagenet-1k")
    return {index: info.index_to_description(index) for index in range(info.num_classes())}
