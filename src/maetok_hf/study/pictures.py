"""Pictures of the study, like Figures 2 and 5 of the paper. The same records give the same files."""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .summaries import Measure, Record, make_measures, values_of
from .variants import VARIANTS


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 120
# colours that can be told apart; then the lines change
STYLES = ("-", "--")
NUM_COLORS = 10


def draw_pictures(folder: Path, preset: str, records: Sequence[Record], mixture_size: int) -> dict[str, str]:
    """
    Draw what the records hold.

    Args:
        folder (`Path`): Where the files go.
        preset (`str`): How their names begin.
        records (`Sequence[Mapping[str, Any]]`): Records of cells.
        mixture_size (`int`): Components of the mixtures in the table.

    Returns:
        `dict[str, str]`: Name of each file, by what it shows; empty if no cell has a generator.
    """
    compared = [record for record in records if "samples" in record["measured"]]
    if not compared:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    measures = make_measures(mixture_size)
    drawn = {}
    for name, draw in (("modes", _modes), ("probe-and-distance", _probe_and_distance)):
        file = f"{preset}-{name}.png"
        temporary = folder / f".{file}"
        # without the version of matplotlib, which is no part of the result
        draw(compared, measures).savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
        os.replace(temporary, folder / file)
        drawn[name] = file
    return drawn


def _figure() -> tuple["Figure", "Axes", "Axes"]:
    # A figure of its own, with matplotlib's Agg canvas: neither a window system nor a global state is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    return figure, *figure.subplots(1, 2)


def _present(records: Sequence[Record]) -> list[tuple[str, list[Record], dict[str, str]]]:
    """Variants of which there are records, with these and how they are drawn."""
    found = []
    for number, name in enumerate(VARIANTS):
        own = [record for record in records if record["identity"]["variant"] == name]
        style = {"color": f"C{number % NUM_COLORS}", "linestyle": STYLES[number // NUM_COLORS % len(STYLES)]}
        if own:
            found.append((name, own, style))
    return found


def _lines(
    axes: "Axes",
    records: Sequence[Record],
    points: Callable[[Record], dict[float, float]],
    with_finetuned: bool = False,
) -> None:
    """A line for each variant, the mean over its seeds, and a band from the smallest to the largest."""
    for name, own, style in _present(records):
        if VARIANTS[name].base is not None and not with_finetuned:
            continue  # the same latents and the same generator as its base
        curves = [points(record) for record in own]
        xs = sorted(curves[0])
        columns = [[curve[x] for curve in curves] for x in xs]
        means = [statistics.fmean(column) for column in columns]
        axes.plot(xs, means, marker="o", markersize=3, label=VARIANTS[name].title, **style)
        low, high = ([extreme(column) for column in columns] for extreme in (min, max))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.legend(fontsize="x-small")


def _modes(records: Sequence[Record], measures: dict[str, Measure]) -> "Figure":
    """Figure 2: likelihood of mixtures, and the generator's loss."""
    figure, left, right = _figure()

    def likelihood(record: Record) -> dict[float, float]:
        values = record["measured"]["latents"]["mixtures"]["same"]["held_out_nll"]
        return {int(size): value for size, value in values.items()}

    _lines(left, records, likelihood)
    left.set_xscale("log")
    sizes = sorted(likelihood(records[0]))
    left.set_xticks(sizes, [f"{size:g}" for size in sizes])
    left.minorticks_off()
    left.set_xlabel("components of the mixture")
    left.set_ylabel("held-out NLL (nats), same dimension for all")
    _lines(right, records, lambda record: {point["step"]: point["loss"] for point in _curve(record)})
    right.set_xlabel("training steps of the generator")
    right.set_ylabel("held-out velocity loss")
    return figure


def _probe_and_distance(records: Sequence[Record], measures: dict[str, Measure]) -> "Figure":
    """Figure 5: discriminative latents and generation, at the end and during training."""
    figure, left, right = _figure()
    for name, _, style in _present(records):
        xs, ys = (values_of(records, name, measures[key]) for key in ("probe", "gfd"))
        marker = "o" if VARIANTS[name].base is None else "x"
        left.scatter(xs, ys, color=style["color"], marker=marker, s=18, label=VARIANTS[name].title)
    left.set_xlabel("linear probe (%)")
    left.set_ylabel("gFD, lower is better; a point for each seed")
    left.legend(fontsize="x-small")
    _lines(right, records, lambda record: {point["step"]: point["distance"] for point in _curve(record)})
    right.set_xlabel("training steps of the generator")
    right.set_ylabel("gFD of few samples")
    right.set_yscale("log")  # it falls by two orders of magnitude
    return figure


def _curve(record: Record) -> list[dict[str, float]]:
    return record["measured"]["generator"]["curve"]
