"""Tokenizers side by side, as JSON and as a table that says how each number was measured."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .chosen_images import describe_images
from .options import AnalysisOptions
from .umap_picture import MIN_DISTANCE


ABSENT = "–"
_DIGEST_LENGTH = 12

Result = Mapping[str, Any]


def make_report(options: AnalysisOptions, results: Mapping[str, Result]) -> dict[str, Any]:
    """
    The contents of `analysis.json`.

    Args:
        options ([`AnalysisOptions`]): What was asked for.
        results (`Mapping[str, Mapping[str, Any]]`): What was measured, by name of the tokenizer.

    Returns:
        `dict[str, Any]`: `protocol`, a list of sentences, and `tokenizers`, by name; plain values. Long lists, which
            pictures need, are left out.
    """
    return {
        "protocol": _protocol(options, results),
        "tokenizers": {name: _shortened(result) for name, result in results.items()},
    }


def _shortened(result: Result) -> dict[str, Any]:
    short = dict(result)
    if "spectrum" in result:
        short["spectrum"] = {name: value for name, value in result["spectrum"].items() if name != "variances"}
    if "umap" in result:
        labels = result["umap"]["labels"]
        short["umap"] = {"num_images": len(labels), "classes": sorted(set(labels)), **_without(result["umap"])}
    short["latents"] = {name: value for name, value in result["latents"].items() if name != "class_names"}
    return short


def _without(umap: Result) -> dict[str, Any]:
    return {name: value for name, value in umap.items() if name not in ("coordinates", "labels")}


def _protocol(options: AnalysisOptions, results: Mapping[str, Result]) -> list[str]:
    first = next(iter(results.values()))
    lines = [_data_line(options, first["latents"])]
    if "statistics" in options.parts:
        lines.append(
            "Effective rank: exponential of the entropy of the singular values as fractions of their sum (Roy and "
            "Vetterli, 2007), of centred training latents, flattened, and of their channels over images and tokens."
        )
    if "probe" in options.parts:
        lines.append(
            "Linear probe: softmax regression on flattened latents, each feature standardised over the training "
            f"latents, l2 {options.probe_l2:g} (half of it times the squared weights, mean cross-entropy), all "
            f"training latents at once by L-BFGS to a derivative of {options.probe_tolerance:g} or "
            f"{options.probe_max_iterations} iterations, float64; accuracy on the held-out latents."
        )
    if "mixtures" in options.parts:
        lines.append(_mixture_line(options))
    if "umap" in options.parts:
        umap = first["umap"]
        lines.append(
            f"UMAP: umap-learn {umap['version']}, {len(umap['labels'])} training latents of "
            f"{len(set(umap['labels']))} classes, flattened, Euclidean, {options.umap_num_neighbors} neighbours, "
            f"least distance {MIN_DISTANCE}, seed {options.seed}; a picture, whose distances are no measure of modes."
        )
    return lines


def _data_line(options: AnalysisOptions, latents: Result) -> str:
    train, held_out = latents["num_images"].values()
    held = (
        f"split {options.held_out_split}" if options.held_out_split else f"a share of it drawn by seed {options.seed}"
    )
    crop = "as their latents were cached" if options.dataset is None else "cropped at the centre"
    return (
        f"Data: {describe_images(options)}, split {latents['split']}, {train} training images; {held}, {held_out} "
        f"held-out images; draws by seed {options.seed}; {crop}. "
        "Latents: what `encode` gives, of a Gaussian posterior its mode, raw; "
        "shift and common scale change no number but those of single channels."
    )


def _mixture_line(options: AnalysisOptions) -> str:
    if options.num_dimensions is not None:
        dimensions = f"{options.num_dimensions} for all tokenizers, as was asked for"
    elif options.same_dimension:
        dimensions = (
            "the same number for all tokenizers, the largest that one needs for more than "
            f"{options.mixture_variance:g} of the variance, unless another has fewer directions"
        )
    else:
        dimensions = (
            f"of each tokenizer as many as hold more than {options.mixture_variance:g} of the variance, so that "
            "likelihoods of different numbers cannot be compared"
        )
    return (
        f"Mixtures: flattened latents, principal components of the training latents ({dimensions}), standardised; "
        f"{options.mixture_covariance} covariances, k-means++ start, exact expectation maximisation until the mean "
        f"log-likelihood changes by less than {options.mixture_tolerance:g} or {options.mixture_max_iterations} "
        f"iterations, {options.mixture_reg_covar:g} added to variances, float64; weights sum to 1. NLL: mean of minus "
        f"the log density of the held-out latents, nats a latent, mean over seeds {_listed(options.mixture_seeds)}, "
        "± their standard deviation; one Gaussian is the standard normal density."
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def nll_by_size(curve: Result, name: str = "held_out_nll") -> dict[int, list[float]]:
    """
    Numbers of a curve by size.

    Args:
        curve (`Mapping[str, Any]`): A [`MixtureCurve`] in plain values.
        name (`str`, *optional*, defaults to `"held_out_nll"`): Which number of its mixtures.

    Returns:
        `dict[int, list[float]]`: One number for each seed, by the number of components in ascending order.
    """
    values: dict[int, list[float]] = {}
    for cell in curve["cells"]:
        values.setdefault(cell["num_components"], []).append(cell[name])
    return dict(sorted(values.items()))


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _best(curve: Result) -> tuple[int, float]:
    """The size of the smallest mean, and that."""
    means = {size: statistics.fmean(values) for size, values in nll_by_size(curve).items()}
    size = min(means, key=means.__getitem__)
    return size, means[size]


def _gain(curve: Result) -> float:
    """Nats a dimension by which the best mixture is below one Gaussian."""
    return (curve["data"]["gaussian_held_out_nll"] - _best(curve)[1]) / curve["data"]["num_dimensions"]


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.2f}"


def _cross_entropy(result: Result) -> str:
    probe = result["probe"]
    if probe["cross_entropy"] is not None:
        return f"{probe['cross_entropy']:.4f}"
    return f"infinite ({probe['num_unseen']} images of classes without a training image)"


def _probe_note(probe: Result) -> str:
    return "" if probe["converged"] else f" (not converged: derivative {probe['gradient']:.1e})"


# heading, part that it needs, and the text of a cell
_ROWS: list[tuple[str, str, Callable[[Result], str]]] = [
    ("class", "latents", lambda r: r["class"]),
    ("encoder", "latents", lambda r: r["encoder"][:_DIGEST_LENGTH]),
    ("resolution", "latents", lambda r: str(r["latents"]["resolution"] or ABSENT)),
    ("tokens x channels", "latents", lambda r: " x ".join(map(str, r["latents"]["shape"]))),
    ("training, held-out images", "latents", lambda r: _listed(r["latents"]["num_images"].values())),
    ("left out: corrupt, without a class", "latents", lambda r: _left_out(r["latents"])),
    ("linear probe, top 1 (%)", "probe", lambda r: _percent(r["probe"]["accuracy"]) + _probe_note(r["probe"])),
    ("linear probe, top 5 (%)", "probe", lambda r: _percent(r["probe"]["top5_accuracy"])),
    ("linear probe, cross-entropy (nats)", "probe", _cross_entropy),
    ("linear probe, training top 1 (%)", "probe", lambda r: _percent(r["probe"]["train_accuracy"])),
    ("linear probe, time (s)", "probe", lambda r: f"{r['probe']['seconds']:.1f} on {r['probe']['device']}"),
    ("effective rank of the latents", "channels", lambda r: _rank(r["spectrum"], r["spectrum"]["num_features"])),
    ("effective rank of the channels", "channels", lambda r: _rank(r["channels"], r["latents"]["shape"][1])),
    ("mean of the channels, least to largest", "channels", lambda r: _range(r["channels"]["mean"])),
    ("deviation of the channels, least to largest", "channels", lambda r: _range(r["channels"]["std"])),
    ("principal components it needs", "mixtures", lambda r: str(r["spectrum"]["num_dimensions"])),
    ("principal components of the mixtures", "mixtures", lambda r: str(r["mixtures"]["data"]["num_dimensions"])),
    ("variance they hold (%)", "mixtures", lambda r: _percent(r["mixtures"]["data"]["explained_variance"])),
    ("NLL, one Gaussian", "mixtures", lambda r: f"{r['mixtures']['data']['gaussian_held_out_nll']:.3f}"),
    ("NLL, best mixture (components)", "mixtures", lambda r: "{1:.3f} ({0})".format(*_best(r["mixtures"]))),
    ("gain over one Gaussian (nats a dimension)", "mixtures", lambda r: f"{_gain(r['mixtures']):.4f}"),
    ("mixtures, time (s)", "mixtures", lambda r: _mixture_time(r["mixtures"])),
]


def _left_out(latents: Result) -> str:
    return _listed([sum(latents[name].values()) for name in ("num_corrupt", "num_unlabeled")])


def _rank(part: Result, of: int) -> str:
    return f"{part['effective_rank']:.1f} of {of}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _mixture_time(curve: Result) -> str:
    devices = dict.fromkeys(cell["device"] for cell in curve["cells"])
    return f"{sum(cell['seconds'] for cell in curve['cells']):.1f} on {', '.join(devices)}"


def to_markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """
    The contents of `analysis.md`.

    Args:
        report (`Mapping[str, Any]`): From [`make_report`].
        pictures (`Sequence[str]`, *optional*): Names of the files of pictures.

    Returns:
        `str`: Tables with a column for each tokenizer, the protocol, and the pictures.
    """
    results = report["tokenizers"]
    lines = ["# Latents side by side", "", *_table(["", *results], _number_rows(results)), ""]
    if any("mixtures" in result for result in results.values()):
        lines += ["Held-out NLL by number of components, in nats a latent:", ""]
        lines += [*_table(["components", *results], _mixture_rows(results)), ""]
    lines += ["How it was measured:", "", *(f"- {line}" for line in report["protocol"]), ""]
    for picture in pictures:
        lines += [f"![{picture.removesuffix('.png')}]({picture})", ""]
    return "\n".join(lines)


def _number_rows(results: Mapping[str, Result]) -> list[list[str]]:
    rows = []
    for heading, part, text in _ROWS:
        cells = [text(result) if part in result else ABSENT for result in results.values()]
        if set(cells) != {ABSENT}:
            rows.append([heading, *cells])
    return rows


def _mixture_rows(results: Mapping[str, Result]) -> list[list[str]]:
    curves = [nll_by_size(result["mixtures"]) for result in results.values()]
    return [[str(size), *(_mean_and_spread(curve[size], 3) for curve in curves)] for size in curves[0]]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [[cell.replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heading))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    padded.insert(1, ["-" * max(3, width) for width in widths])
    return [f"| {' | '.join(row)} |" for row in padded]
