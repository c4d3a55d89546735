"""Latents in a plane, by UMAP (McInnes, Healy and Melville, arXiv 1802.03426): a picture, to read no number from.

Its distances and gaps depend on UMAP's settings more than on the number of modes; mixtures tell that.
"""

import warnings
from typing import Any

import torch

from ..seeding import keyed_generator, keyed_seed
from .options import AnalysisOptions


MIN_DISTANCE = 0.1  # UMAP's own default, named in the protocol


def choose_rows(labels: torch.Tensor, options: AnalysisOptions) -> torch.Tensor:
    """
    Images of the picture.

    Args:
        labels (`torch.Tensor` of shape `(num_images,)`): Classes of the training images, int64.
        options ([`AnalysisOptions`]): How many images and classes, and the seed.

    Returns:
        `torch.Tensor` of shape `(num_chosen,)`: Ascending rows, of the same classes for all tokenizers.

    Raises:
        ValueError: If there are not more than `umap_num_neighbors`.
    """
    classes = labels.unique()
    order = torch.randperm(len(classes), generator=keyed_generator(options.seed, "umap_classes"))
    rows = torch.isin(labels, classes[order[: options.umap_num_classes]]).nonzero().flatten()
    order = torch.randperm(len(rows), generator=keyed_generator(options.seed, "umap_images"))
    rows = rows[order[: options.umap_num_images]].sort().values
    if len(rows) <= options.umap_num_neighbors:
        raise ValueError(
            f"`umap_num_neighbors` is {options.umap_num_neighbors}, but the picture has {len(rows)} images: take "
            "fewer neighbours, or more classes by `umap_num_classes`."
        )
    return rows


def project_umap(latents: torch.Tensor, labels: torch.Tensor, options: AnalysisOptions) -> dict[str, Any]:
    """
    Project a subsample of flattened latents, by their Euclidean distances.

    Args:
        latents (`torch.Tensor` of shape `(num_images, ...)`): Training latents; they may be mapped from a file, and
            only the subsample is brought into memory.
        labels (`torch.Tensor` of shape `(num_images,)`): Their classes.
        options ([`AnalysisOptions`]): Subsample, neighbours and seed.

    Returns:
        `dict[str, Any]`: `coordinates`, a pair for each image, `labels`, and the `version` of umap-learn.

    Raises:
        ValueError: If there are fewer images than neighbours.
    """
    import umap

    rows = choose_rows(labels, options)
    chosen = latents[rows].float().flatten(1)
    reducer = umap.UMAP(
        n_neighbors=options.umap_num_neighbors,
        min_dist=MIN_DISTANCE,
        random_state=keyed_seed(options.seed, "umap") % 2**32,
        n_jobs=1,  # what a seed requires
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Spectral initialisation failed", category=UserWarning)
        coordinates = reducer.fit_transform(chosen.numpy())
    return {
        "coordinates": coordinates.tolist(),
        "labels": labels[rows].tolist(),
        "version": umap.__version__,
    }
