"""Pictures of an analysis: the same numbers give the same files, byte for byte, with the same matplotlib."""

import math
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import nll_by_size


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 150
PANELS_PER_ROW = 3

Results = Mapping[str, Mapping[str, Any]]


def draw_pictures(folder: Path, results: Results) -> list[str]:
    """
    Draw what was measured.

    Args:
        folder (`Path`): Where the files go.
        results (`Mapping[str, Mapping[str, Any]]`): What was measured, by name of the tokenizer.

    Returns:
        `list[str]`: Names of the files, of the parts that there are.
    """
    pictures: dict[str, tuple[str, Callable[[Results], Figure]]] = {
        "mixtures.png": ("mixtures", _mixtures),
        "probe.png": ("probe", _probe),
        "umap.png": ("umap", _umap),
        "spectrum.png": ("channels", _spectrum),
    }
    drawn = []
    for name, (part, draw) in pictures.items():
        if all(part in result for result in results.values()):
            temporary = folder / f".{name}"
            # without the version of matplotlib, which is no part of the result
            draw(results).savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
            os.replace(temporary, folder / name)
            drawn.append(name)
    return drawn


def _figure(num_panels: int = 1, width: float = 4.5, height: float = 3.5) -> tuple["Figure", list["Axes"]]:
    # A figure of its own, with matplotlib's Agg canvas: neither a window system nor a global state is needed.
    from matplotlib.figure import Figure

    columns = min(num_panels, PANELS_PER_ROW)
    rows = math.ceil(num_panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[num_panels:]:
        unused.remove()
    return figure, axes[:num_panels]


def _mixtures(results: Results) -> "Figure":
    """Held-out NLL against the number of components, as in Figure 2 of the paper; the bands span the seeds."""
    figure, (axes,) = _figure(width=5.5, height=4)
    for number, (name, result) in enumerate(results.items()):
        values = nll_by_size(result["mixtures"])
        sizes, dimensions = list(values), result["mixtures"]["data"]["num_dimensions"]
        color = f"C{number % 10}"
        means = [statistics.fmean(values[size]) for size in sizes]
        axes.plot(sizes, means, color=color, marker="o", markersize=3, label=f"{name} ({dimensions} dimensions)")
        low, high = ([extreme(values[size]) for size in sizes] for extreme in (min, max))
        axes.fill_between(sizes, low, high, color=color, alpha=0.2, linewidth=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("components")
    axes.set_ylabel("held-out NLL (nats a latent)")
    axes.legend(fontsize="small")
    return figure


def _probe(results: Results) -> "Figure":
    figure, (axes,) = _figure(width=max(3.5, 1.2 * len(results)))
    for number, result in enumerate(results.values()):
        bar = axes.bar(number, 100 * result["probe"]["accuracy"], color=f"C{number % 10}")
        axes.bar_label(bar, fmt="%.1f", fontsize="small")
    axes.set_xticks(range(len(results)), list(results), rotation=20, ha="right", fontsize="small")
    axes.set_ylabel("linear probe, top 1 (%)")
    return figure


def _umap(results: Results) -> "Figure":
    figure, panels = _figure(len(results))
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        names, labels = result["latents"]["class_names"], result["umap"]["labels"]
        points = list(zip(result["umap"]["coordinates"], labels, strict=True))
        classes = sorted(set(labels))
        for number, label in enumerate(classes):
            x, y = zip(*(point for point, own in points if own == label), strict=True)
            # ten colours that can be told apart, more only where more classes are asked for
            color = f"C{number}" if len(classes) <= 10 else _rainbow(number / len(classes))
            axes.scatter(x, y, s=4, color=color, linewidths=0, label=names[label] if names else str(label))
        axes.set_title(name, fontsize="medium")
        axes.set_xticks([])
        axes.set_yticks([])
    if len(classes) <= 10:
        panels[-1].legend(fontsize="x-small", markerscale=2)
    return figure


def _rainbow(position: float) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["turbo"](position)


def _spectrum(results: Results) -> "Figure":
    """Deviations of the channels, and how much of the variance how many principal components hold."""
    figure, (channels, variances) = _figure(2)
    for number, (name, result) in enumerate(results.items()):
        color = f"C{number % 10}"
        deviations = sorted(result["channels"]["std"], reverse=True)
        largest = deviations[0]
        channels.plot(
            range(1, len(deviations) + 1),
            [value / largest for value in deviations],
            color=color,
            marker="o",
            markersize=3,
            label=f"{name} (rank {result['channels']['effective_rank']:.1f})",
        )
        held = _cumulated(result["spectrum"]["variances"])
        rank = result["spectrum"]["effective_rank"]
        variances.plot(range(1, len(held) + 1), held, color=color, label=f"{name} (rank {rank:.1f})")
    channels.locator_params(axis="x", integer=True)
    channels.set_xlabel("channel, largest deviation first")
    channels.set_ylabel("standard deviation / largest")
    channels.set_ylim(0, 1.05)
    variances.set_xlabel("principal components of flattened latents")
    variances.set_ylabel("share of the variance")
    variances.set_xscale("log")
    for axes in (channels, variances):
        axes.legend(fontsize="small")
    return figure


def _cumulated(values: list[float]) -> list[float]:
    total, held, shares = math.fsum(values), 0.0, []
    for value in values:
        held += value
        shares.append(held / total)
    return shares
