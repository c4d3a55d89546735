"""Means and intervals over seeds, and whether the orderings of the paper appear."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .variants import VARIANTS


CONFIDENCE = 0.95

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """
    A number of a cell that is compared.

    Args:
        name (`str`): For columns in code.
        title (`str`): For tables; `{classifier}` is the classifier's name.
        part (`str`): Part of the measures that holds it.
        path (`tuple[str, ...]`): Keys to it in the part.
        better (`int`): 1 if more is better, -1 if less is.
        digits (`int`): After the point.
        factor (`float`, *optional*, defaults to 1.0): What it is multiplied by.
        over (`tuple[str, ...]`, *optional*): Part and keys of a number that it is divided by.
    """

    name: str
    title: str
    part: str
    path: tuple[str, ...]
    better: int
    digits: int
    factor: float = 1.0
    over: tuple[str, ...] = ()

    def of(self, record: Record) -> float | None:
        """
        The number in a record.

        Args:
            record (`Mapping[str, Any]`): The record of a cell.

        Returns:
            `float`, *optional*: `None` if the cell has no such part.
        """
        measured = record["measured"]
        if self.part not in measured:
            return None
        divisor = _at(measured, self.over) if self.over else 1.0
        return self.factor * _at(measured[self.part], self.path) / divisor


def _at(value: Any, path: Sequence[str]) -> float:
    for key in path:
        value = value[key]
    return value


def make_measures(mixture_size: int) -> dict[str, Measure]:
    """
    The columns of the table.

    Args:
        mixture_size (`int`): Components of the mixtures whose likelihood is in it.

    Returns:
        `dict[str, Measure]`: By name.
    """
    size = str(mixture_size)
    found = (
        Measure("rfd", "rFD ({classifier})", "reconstruction", ("distance",), -1, 2),
        Measure("psnr", "PSNR (dB)", "reconstruction", ("psnr",), 1, 2),
        Measure("probe", "linear probe (%)", "latents", ("probe_accuracy",), 1, 1, 100.0),
        Measure("nll", f"GMM NLL, {size} components", "latents", ("mixtures", "same", "held_out_nll", size), -1, 2),
        Measure("loss", "SiT loss", "generator", ("loss",), -1, 3),
        Measure("gaussian", "loss of a Gaussian", "latents", ("gaussian_loss",), -1, 3),
        Measure("ratio", "ratio of the two", "generator", ("loss",), -1, 3, over=("latents", "gaussian_loss")),
        Measure("gfd", "gFD ({classifier})", "samples", ("distance",), -1, 2),
        Measure("recognition", "recognised (%)", "samples", ("recognition",), 1, 1, 100.0),
        Measure("precision", "precision", "samples", ("precision",), 1, 3),
        Measure("recall", "recall", "samples", ("recall",), 1, 3),
        Measure("own_nll", f"GMM NLL, {size} components", "latents", ("mixtures", "own", "held_out_nll", size), -1, 2),
        Measure("dimensions", "dimensions", "latents", ("mixtures", "own", "num_dimensions"), -1, 1),
        Measure("explained", "variance (%)", "latents", ("mixtures", "same", "explained_variance"), 1, 1, 100.0),
        Measure("variance", "variance about the mean latent", "latents", ("variance",), 1, 3),
        Measure("rank", "effective rank", "latents", ("effective_rank",), 1, 1),
        Measure("second_psnr", "PSNR (dB)", "second_reconstruction", ("psnr",), 1, 2),
        Measure("second_rfd", "rFD ({classifier})", "second_reconstruction", ("distance",), -1, 2),
    )
    return {measure.name: measure for measure in found}


@dataclass(frozen=True)
class Interval:
    """
    A mean over seeds.

    Args:
        mean (`float`): The mean.
        half (`float`, *optional*): Half of the 95 % t-interval; `None` for one seed.
        count (`int`): Seeds.
    """

    mean: float
    half: float | None
    count: int

    def text(self, digits: int) -> str:
        """
        `mean ± half`.

        Args:
            digits (`int`): After the point.

        Returns:
            `str`: For a table.
        """
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


def _quantile(degrees: float) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))


def interval(values: Sequence[float]) -> Interval:
    """
    Mean and 95 % t-interval of independent numbers.

    Args:
        values (`Sequence[float]`): One of each seed.

    Returns:
        [`Interval`]: Without a width for one number.

    Raises:
        ValueError: If there is none.
    """
    if not values:
        raise ValueError("`values` must not be empty.")
    count = len(values)
    half = None
    if count > 1:
        half = _quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), half, count)


def difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """
    Difference of two means with its 95 % interval by Welch's t-test, which lets the variances differ.

    Args:
        first (`Sequence[float]`): Numbers of one tokenizer, one of each seed.
        second (`Sequence[float]`): Those of another.

    Returns:
        [`Interval`]: Of `first` minus `second`; without a width if one of them has a single number.
    """
    count = min(len(first), len(second))
    difference = statistics.fmean(first) - statistics.fmean(second)
    if count < 2:
        return Interval(difference, None, count)
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    if sum(errors) == 0:
        return Interval(difference, 0.0, count)
    parts = (error**2 / (len(values) - 1) for error, values in zip(errors, (first, second), strict=True))
    degrees = sum(errors) ** 2 / sum(parts)
    return Interval(difference, _quantile(degrees) * math.sqrt(sum(errors)), count)


def paired_difference_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """
    Difference of two means with its 95 % t-interval, of numbers that belong together two by two.

    Args:
        first (`Sequence[float]`): Numbers of one tokenizer, one of each seed.
        second (`Sequence[float]`): Those of another that shares something with it, in the same order.

    Returns:
        [`Interval`]: Of `first` minus `second`; without a width for a single pair.
    """
    return interval([one - other for one, other in zip(first, second, strict=True)])


@dataclass(frozen=True)
class Claim:
    """
    An ordering of the paper: one tokenizer is better than another by some measure.

    Args:
        better (`str`): Name of the variant that is better there.
        worse (`str`): The other.
        measure (`str`): Name of the measure.
        source (`str`): Where the paper says so.
    """

    better: str
    worse: str
    measure: str
    source: str


CLAIMS = (
    Claim("maetok", "autoencoder", "probe", "section 4.3: more discriminative latents"),
    Claim("maetok", "kl-vae", "probe", "section 4.3"),
    Claim("maetok", "autoencoder", "nll", "Figure 2: fewer modes"),
    Claim("maetok", "kl-vae", "nll", "Figure 2"),
    Claim("maetok", "autoencoder", "loss", "Figure 2: lower diffusion loss"),
    Claim("maetok", "kl-vae", "loss", "Figure 2"),
    Claim("maetok", "autoencoder", "ratio", "Figure 2, for what covariances do not explain"),
    Claim("maetok", "kl-vae", "ratio", "Figure 2, for what covariances do not explain"),
    Claim("kl-vae", "autoencoder", "gfd", "gFID 22.17 against 24.47"),
    Claim("maetok", "kl-vae", "gfd", "HOG alone: gFID 13.54 against 22.17"),
    Claim("maetok", "autoencoder", "gfd", "HOG alone: gFID 13.54 against 24.47"),
    Claim("maetok-finetuned", "maetok", "gfd", "gFID 5.69 against 5.78, with all targets"),
    Claim("maetok-finetuned", "maetok", "rfd", "rFID 0.48 against 0.85, with all targets"),
    Claim("autoencoder", "maetok", "rfd", "rFID 0.67 against 0.85, with all targets"),
    Claim("autoencoder", "kl-vae", "rfd", "rFID 0.67 against 1.22"),
    Claim("maetok", "masked-pixels", "gfd", "targets: gFID 13.54 against 17.18"),
    Claim("maetok", "targets", "gfd", "masks: gFID 5.78 against 8.44, with all targets"),
    Claim("maetok", "image-tokens", "gfd", "learnable tokens: gFID 5.78 against 6.85, with all targets"),
    Claim("kl-vae-masked", "kl-vae", "gfd", "gFID 18.17 against 22.17"),
    Claim("two-sizes-rope", "two-sizes-absolute", "rfd", "rFID 0.51 against 0.73 at the first resolution"),
    Claim("two-sizes-rope", "two-sizes-absolute", "second_rfd", "rFID 0.72 against 1.43 at the second"),
)


def values_of(records: Sequence[Record], variant: str, measure: Measure) -> list[float]:
    """
    A measure of all seeds of a tokenizer.

    Args:
        records (`Sequence[Mapping[str, Any]]`): Records of cells.
        variant (`str`): Name of the tokenizer.
        measure ([`Measure`]): The measure.

    Returns:
        `list[float]`: By seed; empty if there are none.
    """
    own = [record for record in records if record["identity"]["variant"] == variant]
    values = [measure.of(record) for record in sorted(own, key=lambda record: record["identity"]["seed"])]
    return [value for value in values if value is not None]


def verdict(records: Sequence[Record], claim: Claim, measure: Measure) -> tuple[str, Interval] | None:
    """
    Whether an ordering appears.

    Args:
        records (`Sequence[Mapping[str, Any]]`): Records of cells.
        claim ([`Claim`]): The ordering.
        measure ([`Measure`]): Its measure.

    Returns:
        `tuple[str, Interval]`, *optional*: `"yes"` or `"no"` (the other way round) if the interval of the difference
        leaves 0 out, otherwise `"not resolved"`; and the difference, the better one's minus the other's. `None` if
        numbers are missing.
    """
    first, second = (values_of(records, name, measure) for name in (claim.better, claim.worse))
    if not first or not second:
        return None
    related = VARIANTS[claim.better].base == claim.worse or VARIANTS[claim.worse].base == claim.better
    if related:  # of one seed they have the same latents, generator and noises
        seeds = [
            {record["identity"]["seed"] for record in records if record["identity"]["variant"] == name}
            for name in (claim.better, claim.worse)
        ]
        common = [record for record in records if record["identity"]["seed"] in set.intersection(*seeds)]
        pairs = [values_of(common, name, measure) for name in (claim.better, claim.worse)]
        if not pairs[0]:
            return None
        found = paired_difference_interval(*pairs)
    else:
        found = difference_interval(first, second)
    if found.half is None or abs(found.mean) <= found.half:
        return "not resolved", found
    return ("yes" if found.mean * measure.better > 0 else "no"), found
