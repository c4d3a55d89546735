"""What is unusual about the rows of a data set: counted in every batch, and named in the log without flooding it."""

import logging
from collections.abc import Callable, Iterable

import torch


MAX_ROW_WARNINGS = 10

# The order of `counts` in a batch.
COUNT_NAMES = (
    "corrupt",  # no image, or one that cannot be decoded: another row stands in for it, or it is left out
    "unlabeled",  # the label is missing or is no class of the data set
    "uncaptioned",  # the caption is missing or blank
    "grayscale",
    "palette",
    "cmyk",
    "sixteen_bit",  # scaled to 8 bits
    "other_mode",  # of another color space, converted to RGB
    "transparent",  # composited on white
    "rotated",  # turned upright as EXIF says
    "enlarged",  # the short side was smaller than the resolution
    "elongated",  # the ends were cut, see `MAX_ASPECT_RATIO`
    "huge",  # more pixels than `HUGE_PIXELS`
)
_POSITIONS = {name: position for position, name in enumerate(COUNT_NAMES)}


def count_names(names: Iterable[str]) -> torch.Tensor:
    """
    Args:
        names (`Iterable[str]`): Names of `COUNT_NAMES`, each as often as it occurred.

    Returns:
        `torch.Tensor`: How often each occurred, int64 of shape `(len(COUNT_NAMES),)`. Sums of these over batches and
        processes are counts too.
    """
    counts = [0] * len(COUNT_NAMES)
    for name in names:
        counts[_POSITIONS[name]] += 1
    return torch.tensor(counts, dtype=torch.int64)


def describe_counts(counts: torch.Tensor) -> str:
    """
    Args:
        counts (`torch.Tensor`): The `counts` of a batch, or a sum of them, of shape `(len(COUNT_NAMES),)`.

    Returns:
        `str`: What occurred and how often, for a log, such as `"3 corrupt, 41 grayscale"`; `"nothing unusual"` if
        nothing did.
    """
    found = [f"{count} {name}" for name, count in zip(COUNT_NAMES, counts.tolist(), strict=True) if count]
    return ", ".join(found) or "nothing unusual"


class RowCounts:
    """
    What was unusual about the rows of a run and of its part since the last report, of this process until it is asked
    for all.

    Args:
        sum_over_processes (`Callable[[torch.Tensor], torch.Tensor]`): Sums an int64 tensor over all processes, each of
            which must call `state`, `describe`, `report` or `of_run` when another does.
    """

    def __init__(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]):
        self._sum = sum_over_processes
        self._counts = torch.zeros(2, len(COUNT_NAMES), dtype=torch.int64)  # since the last report, and before it

    def add(self, counts: torch.Tensor) -> None:
        """
        Args:
            counts (`torch.Tensor`): The `counts` of a batch.
        """
        self._counts[0] += counts

    def state(self) -> list[list[int]]:
        """`list[list[int]]`: The counts of all processes, since the last report and before it, for a checkpoint."""
        return self._sum(self._counts).tolist()

    def load(self, state: list[list[int]]) -> None:
        """
        Args:
            state (`list[list[int]]`): The `state` of an earlier run, to be loaded by one process only.
        """
        self._counts += torch.tensor(state)

    def describe(self) -> str:
        """`str`: The counts of all processes since the last report in words, see [`describe_counts`]."""
        return describe_counts(self._sum(self._counts)[0])

    def report(self) -> str:
        """`str`: As [`~RowCounts.describe`]; they begin anew."""
        words = self.describe()
        self._counts[1] += self._counts[0]
        self._counts[0] = 0
        return words

    def of_run(self) -> dict[str, int]:
        """`dict[str, int]`: The counts of all processes in the whole run, by name, of what occurred at all."""
        total = self._sum(self._counts).sum(0).tolist()
        return {name: count for name, count in zip(COUNT_NAMES, total, strict=True) if count}


class RowWarnings:
    """
    Logs what is wrong with single rows without flooding the log: each row once, the first `MAX_ROW_WARNINGS` rows of
    this process in full, then only how many there were, at every power of ten.

    Args:
        logger (`logging.Logger`): Where to.
        description (`str`): The data set.
    """

    def __init__(self, logger: logging.Logger, description: str):
        self.logger = logger
        self.description = description
        self.rows: set[int] = set()

    def __call__(self, row: int, message: str) -> None:
        """
        Args:
            row (`int`): Position in the data set.
            message (`str`): What is wrong with it.
        """
        if row in self.rows:
            return
        self.rows.add(row)
        count = len(self.rows)
        if count <= MAX_ROW_WARNINGS:
            more = " Further rows are counted only." if count == MAX_ROW_WARNINGS else ""
            self.logger.warning("%s%s", message, more)
        elif str(count).strip("0") == "1":
            self.logger.warning("%d rows of %s could not be used by this process so far.", count, self.description)
