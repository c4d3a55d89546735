"""Modules for `evaluate`, one folder each, which can also be uploaded to the Hub as Spaces."""

from pathlib import Path


NAMES = ("fid", "inception_score", "precision_recall")


def metric_folder(name: str) -> str:
    """
    Where a module lies, for `evaluate.load(metric_folder("fid"))`.

    Args:
        name (`str`): `"fid"`, `"inception_score"` or `"precision_recall"`.

    Returns:
        `str`: The folder.

    Raises:
        ValueError: If there is no such module.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, NAMES))}, got {name!r}.")
    return str(Path(__file__).with_name(name))
