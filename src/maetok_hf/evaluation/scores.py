"""The numbers of a set of generated images, by name."""

from collections.abc import Sequence

import torch

from .collection import FeatureCollector
from .distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)
from .reference import Reference


INCEPTION = "inception"
NUM_NEIGHBORS = 3
# layers that a metric needs: whether it needs their statistics or the features of each image, and of which sets
STATISTICS_OF = {"fid": "pool", "sfid": "spatial"}
FEATURES_OF = {"precision_recall": "pool", "kid": "pool", "kid_subsets": "pool"}
LOGITS_OF = {"inception_score": "logits"}
LABELS = {
    "fid": "FID",
    "fd": "FD",
    "sfid": "sFID",
    "sfd": "FD, spatial features",
    "inception_score": "Inception Score",
    "inception_score_std": "Inception Score, deviation of splits",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID, whole sets",
    "kid_subsets": "KID, mean of subsets",
    "kid_subsets_std": "KID, deviation of subsets",
}


def needed_layers(metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    What metrics need of the generated images.

    Args:
        metrics (`Sequence[str]`): Their names.

    Returns:
        `tuple[list[str], list[str]]`: Layers whose statistics, and layers whose features are needed.
    """
    statistics = [STATISTICS_OF[name] for name in metrics if name in STATISTICS_OF]
    kept = [(FEATURES_OF | LOGITS_OF)[name] for name in metrics if name in FEATURES_OF | LOGITS_OF]
    return list(dict.fromkeys(statistics)), list(dict.fromkeys(kept))


def needed_reference_layers(metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    What metrics need of the reference.

    Args:
        metrics (`Sequence[str]`): Their names.

    Returns:
        `tuple[list[str], list[str]]`: Layers whose statistics, and layers whose features are needed.
    """
    return needed_layers([name for name in metrics if name not in LOGITS_OF])


def check_layers(metrics: Sequence[str], layers: Sequence[str], extractor: str) -> None:
    """
    Make sure, before any work, that an extractor gives what metrics need.

    Args:
        metrics (`Sequence[str]`): Their names.
        layers (`Sequence[str]`): What the extractor gives.
        extractor (`str`): Its name.

    Raises:
        ValueError: If a layer is missing; names the metrics that need it.
    """
    needed = STATISTICS_OF | FEATURES_OF | LOGITS_OF
    missing = {name: needed[name] for name in metrics if needed[name] not in layers}
    if missing:
        raise ValueError(
            f"`metrics` {', '.join(missing)} need the layers {', '.join(sorted(set(missing.values())))}, but the "
            f"extractor {extractor!r} gives {', '.join(layers)}: leave them out, or choose another `extractor`."
        )


def check_counts(metrics: Sequence[str], num_images: int, num_reference: int | None, kid_subset_size: int) -> None:
    """
    Make sure, before any work, that there are as many images as metrics need.

    Args:
        metrics (`Sequence[str]`): Their names.
        num_images (`int`): Generated images.
        num_reference (`int`, *optional*): Images of the reference, if that is known.
        kid_subset_size (`int`): Images of a subset of `kid_subsets`.

    Raises:
        ValueError: If there are fewer.
    """
    needed = {"fid": 2, "sfid": 2, "kid": 2, "precision_recall": NUM_NEIGHBORS + 1, "kid_subsets": kid_subset_size}
    for name in metrics:
        for what, count in (("images", num_images), ("reference images", num_reference)):
            if count is not None and count < needed.get(name, 1):
                hint = ", or a smaller `kid_subset_size`" if name == "kid_subsets" else ""
                raise ValueError(
                    f"`metrics` {name!r} needs {needed[name]} {what}, but there are {count}: take more{hint}, or "
                    "leave it out."
                )


def compute_scores(
    metrics: Sequence[str],
    generated: FeatureCollector,
    reference: Reference | None,
    *,
    extractor: str = INCEPTION,
    kid_subset_size: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """
    Compute metrics of features that were collected.

    Args:
        metrics (`Sequence[str]`): Names of metrics.
        generated ([`FeatureCollector`]): All generated images.
        reference ([`Reference`], *optional*): What they are compared with; the Inception Score needs none.
        extractor (`str`, *optional*, defaults to `"inception"`): What gave the features. A Fréchet distance in those
            of another network than Inception is no FID, and is called `fd`, `sfd` in spatial ones.
        kid_subset_size (`int`, *optional*, defaults to 1000): Images of a subset of `kid_subsets`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where distances are computed, in float64.

    Returns:
        `dict[str, float]`: By the names of `LABELS`.

    Raises:
        ValueError: If the sets are too small for a metric.
    """
    results: dict[str, float] = {}
    for metric in metrics:
        if metric in STATISTICS_OF:
            layer = STATISTICS_OF[metric]
            name = metric if extractor == INCEPTION else metric.replace("fid", "fd")
            results[name] = frechet_distance(generated.moments(layer), reference.moments(layer))
        elif metric == "inception_score":
            results["inception_score"], results["inception_score_std"] = inception_score(generated.features("logits"))
        else:
            sets = (generated.features("pool"), reference.features("pool"))
            if metric == "precision_recall":
                results["precision"], results["recall"] = precision_recall(
                    *sets, num_neighbors=NUM_NEIGHBORS, device=device
                )
            elif metric == "kid":
                results["kid"] = kernel_distance(*sets, device=device)
            else:
                found = kernel_distance_of_subsets(*sets, subset_size=kid_subset_size, device=device)
                results["kid_subsets"], results["kid_subsets_std"] = found
    return results
