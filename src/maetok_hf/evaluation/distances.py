"""What is computed of features: Fréchet and kernel distance, Inception Score, improved precision and recall."""

import numpy as np
import torch

from .extras import needing
from .statistics import Moments


NUM_KID_SUBSETS = 100
# of the kernel distance: a block of 2048 x 2048 takes 34 MB in float64
CHUNK_SIZE = 2048
# of precision and recall: bytes of one block of distances
DISTANCE_BYTES = 128 * 2**20


def frechet_distance(first: Moments, second: Moments) -> float:
    """
    Fréchet distance of two Gaussians (Heusel et al., arXiv 1706.08500, equation 6): FID on Inception's pooled
    features, sFID on its spatial ones, FD-DINOv2 on those.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. The eigenvalues of `S1 S2` are the squared singular values of
    `S1^(1/2) S2^(1/2)`, and symmetric roots come from `eigh`, so that the trace is a sum of singular values. A matrix
    root of the product, which is not symmetric, fails or turns complex where there are fewer samples than features,
    and square roots of eigenvalues that are 0 up to rounding would add 1e-8 each.

    Args:
        first ([`Moments`]): One set.
        second ([`Moments`]): The other.

    Returns:
        `float`: The distance, not negative.

    Raises:
        ValueError: If the sets have different numbers of features, or a number is not finite.
    """
    for name, moments in (("first", first), ("second", second)):
        if not (moments.mean.isfinite().all() and moments.covariance.isfinite().all()):
            raise ValueError(f"`{name}` has a mean or a covariance that is not finite: run the extractor in float32.")
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"`first` has {len(first.mean)} features but `second` {len(second.mean)}: use one extractor for both."
        )
    difference = first.mean - second.mean
    cross = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance).T).sum()
    distance = difference.square().sum() + first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """A matrix R with R^T R = S, up to a rotation from the left, which singular values do not see."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def kernel_distance(
    first: torch.Tensor, second: torch.Tensor, chunk_size: int = CHUNK_SIZE, device: torch.device | str = "cpu"
) -> float:
    """
    Squared maximum mean discrepancy of two sets with the kernel `(x . y / dim + 1)^3`, without bias (Bińkowski et
    al., arXiv 1801.01401): KID with one subset, the whole set. The sets may differ in size, and no more than a block
    of the kernel is in memory.

    Args:
        first (`torch.Tensor` of shape `(m, dim)`): Features.
        second (`torch.Tensor` of shape `(n, dim)`): Features.
        chunk_size (`int`, *optional*, defaults to 2048): Rows and columns of a block.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where blocks are computed, in float64.

    Returns:
        `float`: The estimate, which may be negative.

    Raises:
        ValueError: If the features do not fit together or are not finite, or a set has fewer than two samples.
    """
    _check_features(first, second)
    if min(len(first), len(second)) < 2:
        raise ValueError(f"A kernel distance needs two samples of each set, got {len(first)} and {len(second)}.")
    within = 0.0
    for features in (first, second):
        total = _kernel_sum(features, features, chunk_size, device) - _kernel_diagonal(features, chunk_size)
        within += total / (len(features) * (len(features) - 1))
    return within - 2 * _kernel_sum(first, second, chunk_size, device) / (len(first) * len(second))


def _kernel_sum(first: torch.Tensor, second: torch.Tensor, chunk_size: int, device: torch.device | str) -> float:
    total = 0.0
    for rows in first.split(chunk_size):
        rows = rows.to(device, torch.float64) / first.shape[1]
        for columns in second.split(chunk_size):
            total += float((rows @ columns.to(device, torch.float64).T).add_(1).pow_(3).sum())
    return total


def _kernel_diagonal(features: torch.Tensor, chunk_size: int) -> float:
    norms = (rows.double().square().sum(dim=1) / features.shape[1] for rows in features.split(chunk_size))
    return sum(float((values + 1).pow(3).sum()) for values in norms)


def kernel_distance_of_subsets(
    first: torch.Tensor,
    second: torch.Tensor,
    num_subsets: int = NUM_KID_SUBSETS,
    subset_size: int = 1000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """
    KID as it is usually reported: mean and spread of [`kernel_distance`] over random subsets. Seed and draws are those
    of torch-fidelity, so that the same features in the same order give its numbers.

    Args:
        first (`torch.Tensor` of shape `(m, dim)`): Features.
        second (`torch.Tensor` of shape `(n, dim)`): Features.
        num_subsets (`int`, *optional*, defaults to 100): Subsets.
        subset_size (`int`, *optional*, defaults to 1000): Samples of each set in a subset, without repetition.
        seed (`int`, *optional*, defaults to 2020): Seed of the draws.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where blocks are computed, in float64.

    Returns:
        `tuple[float, float]`: Mean and standard deviation (divided by the number of subsets).

    Raises:
        ValueError: If the features do not fit together or are not finite, or a set is smaller than a subset.
    """
    _check_features(first, second)
    if not 2 <= subset_size <= min(len(first), len(second)) or num_subsets < 1:
        raise ValueError(
            f"`subset_size` must be from 2 to the size of the smaller set, {min(len(first), len(second))}, and "
            f"`num_subsets` positive, got {subset_size} and {num_subsets}."
        )
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        subsets = [
            features[torch.from_numpy(generator.choice(len(features), subset_size, replace=False))]
            for features in (first, second)
        ]
        values.append(kernel_distance(*subsets, device=device))
    return float(np.mean(values)), float(np.std(values))


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> tuple[float, float]:
    """
    Inception Score (Salimans et al., arXiv 1606.03498) in the order of ADM's suite: consecutive splits of 5000 images,
    not shuffled, the last one smaller where the number is no multiple. Each split is scored by torch-fidelity, in
    float64.

    The order matters: images sorted by class give a lower score than the same images shuffled, as a split of them has
    fewer classes.

    Args:
        logits (`torch.Tensor` of shape `(num_images, num_classes)`): By image index; ADM's are Inception's without the
            bias.
        split_size (`int`, *optional*, defaults to 5000): Images of a split.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the splits; the latter is 0 for one split.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If there are no logits, one is not finite, or `split_size` is not positive.
    """
    with needing("torch-fidelity"):
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if logits.ndim != 2 or len(logits) == 0 or split_size < 1:
        raise ValueError(
            f"`logits` must be of shape (n, classes) and `split_size` positive, got {tuple(logits.shape)} and "
            f"{split_size}."
        )
    _check_finite("`logits`", logits)
    scores = [
        isc_features_to_metric(split, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for split in logits.split(split_size)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    generated: torch.Tensor,
    reference: torch.Tensor,
    num_neighbors: int = 3,
    max_bytes: int = DISTANCE_BYTES,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991) by torch-fidelity, with distances in float64.

    Precision is the part of the generated samples that lie in the ball of a reference sample, whose radius is the
    distance to its k-th neighbour, the border included; recall is the same with the roles exchanged. Both depend on
    the sizes of the sets: ADM's numbers have 50 000 generated and 10 000 reference images. Its suite computes
    distances in half precision.

    Args:
        generated (`torch.Tensor` of shape `(m, dim)`): Features.
        reference (`torch.Tensor` of shape `(n, dim)`): Features.
        num_neighbors (`int`, *optional*, defaults to 3): k.
        max_bytes (`int`, *optional*, defaults to 128 MiB): Of one block of distances. A few of them are in memory, and
            both sets in float64.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where distances are computed.

    Returns:
        `tuple[float, float]`: Precision and recall.

    Raises:
        ImportError: If torch-fidelity is not installed.
        ValueError: If the features do not fit together or are not finite, or a set has no more samples than
            neighbours.
    """
    with needing("torch-fidelity"):
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _check_features(generated, reference)
    largest, smallest = (function(len(generated), len(reference)) for function in (max, min))
    if not 1 <= num_neighbors < smallest:
        raise ValueError(
            f"`num_neighbors` must be positive and below the size of the smaller set, {smallest}, got {num_neighbors}."
        )
    found = prc_features_to_metric(
        generated.to(device, torch.float64),
        reference.to(device, torch.float64),
        prc_neighborhood=num_neighbors,
        prc_batch_size=max(1, max_bytes // (8 * largest)),
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _check_features(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Features must be of shapes (m, dim) and (n, dim), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    _check_finite("Features", first, second)


def _check_finite(name: str, *values: torch.Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise ValueError(f"{name} must be finite numbers: run the extractor in float32, and look at the images.")
