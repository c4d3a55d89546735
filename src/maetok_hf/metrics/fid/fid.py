"""Fréchet distance of two sets of images in the features of a network, for `evaluate`."""

from typing import Any

from maetok_hf.evaluation import Moments, feature_moments, frechet_distance, load_moments
from maetok_hf.evaluation.extractors import load_statistics
from maetok_hf.metrics.feature_metric import FeatureMetric, feature_blocks
from maetok_hf.moments import RunningMoments


USAGE = """
    reference_statistics: An `.npz` file of the references' mean and covariance, instead of `references`: a reference
        file of ADM's suite (`VIRTUAL_imagenet256_labeled.npz`), or one of `maetok_hf.evaluation.save_moments`.
Returns:
    fid: The distance, not negative. It depends on the number of images: compare only equal numbers.
Examples:
    >>> fid = evaluate.load(metric_folder("fid"))
    >>> for generated, real in batches:
    ...     fid.add_batch(predictions=generated, references=real)
    >>> fid.compute()
"""
CITATION = """\
@inproceedings{heusel2017ttur,
    title={{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
    author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
    booktitle={Advances in Neural Information Processing Systems},
    year={2017}
}
"""


class FID(FeatureMetric):
    description = (
        "Fréchet distance between Gaussians fitted to the features of two sets of images: FID on the 2048 pooled "
        "features of Inception, FD-DINOv2 on those of a DINOv2. Computed in float64."
    )
    usage, citation = USAGE, CITATION
    reference_urls = ("https://arxiv.org/abs/1706.08500",)

    def _compute(self, predictions: Any, references: Any, reference_statistics: str | None = None) -> dict[str, float]:
        generated = moments_of("predictions", predictions)
        if reference_statistics is None:
            return {"fid": frechet_distance(generated, moments_of("references", references))}
        if references.null_count < len(references):
            raise ValueError("Give either `references` or `reference_statistics`.")
        if self.extractor is None:
            moments, _ = load_moments(reference_statistics)
        else:
            moments = load_statistics(reference_statistics, self.extractor)
        if self.layer not in moments:
            raise ValueError(f"{reference_statistics} has no statistics of pooled features.")
        return {"fid": frechet_distance(generated, moments[self.layer])}


def moments_of(name: str, column: Any) -> Moments:
    """
    Mean and covariance of an input, whose rows are read block by block.

    Args:
        name (`str`): Of the input, for messages.
        column (`pyarrow.ChunkedArray`): What `evaluate` gives to `_compute`.
    """
    running = None
    for rows in feature_blocks(name, column):
        running = running or RunningMoments.zeros(rows.shape[1])
        running.update(rows)
    return feature_moments(running)
