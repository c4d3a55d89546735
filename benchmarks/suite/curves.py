"""The picture of how speed scales: with tokens, with images of a batch, with the size of an image."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import DTYPES, Case


if TYPE_CHECKING:
    from matplotlib.axes import Axes


DPI = 120
COLORS = dict(zip(DTYPES, ("tab:blue", "tab:orange"), strict=True))


def points_of(
    records: Sequence[dict[str, Any]], cases: Sequence[Case], group: str, device: str, dtype: str
) -> list[tuple[float, dict[str, Any]]]:
    """
    A curve: where its measured points lie, from left to right, and their records.

    Args:
        records (`Sequence[dict]`): Records of the suite.
        cases (`Sequence[Case]`): Its cases, of which some have a `point`.
        group, device, dtype (`str`): Whose curve.
    """
    places = {case.name: case.point for case in cases if case.group == group and case.point is not None}
    return sorted(
        (
            (places[record["case"]], record)
            for record in records
            if (record["group"], record["device"], record["dtype"]) == (group, device, dtype)
            and record["case"] in places
            and "failed" not in record
        ),
        key=lambda point: point[0],
    )


def _plot(axes: "Axes", curve: list[tuple[float, dict[str, Any]]], what: str, dtype: str) -> None:
    xs = [place for place, _ in curve]
    if what == "images/s":
        values = [{name: record["images"] / value for name, value in record["seconds"].items()} for _, record in curve]
    else:
        values = [{name: 100 * value for name, value in record["share_of_matmul"].items()} for _, record in curve]
    middle = [value["median"] for value in values]
    axes.plot(xs, middle, marker="o", markersize=3, linewidth=1.2, color=COLORS[dtype], label=dtype)
    ends = [sorted((value["quartile_1"], value["quartile_3"])) for value in values]
    axes.fill_between(xs, *zip(*ends, strict=True), alpha=0.2, color=COLORS[dtype], linewidth=0)


def draw(report: dict[str, Any], cases: Sequence[Case], device: str, path: Path) -> bool:
    """
    Draw the curves of a device, medians with quartiles. The same report gives the same file, with the same matplotlib.

    Args:
        report (`dict`): A result of the suite.
        cases (`Sequence[Case]`): The suite's cases.
        device (`str`): Whose curves.
        path (`Path`): The PNG file.

    Returns:
        `bool`: Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(case.group for case in cases if case.point is not None))
    curves = {
        (group, dtype): curve
        for group in groups
        for dtype in DTYPES
        if len(curve := points_of(report["records"], cases, group, device, dtype)) > 1
    }
    if not curves:
        return False
    groups = [group for group in groups if any(group == measured for measured, _ in curves)]
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for column, group in enumerate(groups):
        for row, what in enumerate(("images/s", "share of the matrix rate (%)")):
            axes, ticks = panels[row][column], set()
            for dtype in DTYPES:
                if curve := curves.get((group, dtype)):
                    _plot(axes, curve, what, dtype)
                    ticks |= {place for place, _ in curve}
            axes.set_xscale("log", base=2)
            if row == 0:
                axes.set_yscale("log", base=2)
                axes.set_title(next(case.curve for case in cases if case.group == group), fontsize="medium")
            else:
                axes.set_ylim(0, 105)
                axes.set_xlabel(group)
            axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(what)
    panels[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    return True
