"""Inception Score of a set of images, for `evaluate`."""

from typing import Any

from maetok_hf.evaluation import inception_score
from maetok_hf.metrics.feature_metric import FeatureMetric, feature_tensor


USAGE = """
    split_size: Images of a split, 5000 in ADM's suite. Splits are consecutive: images that are sorted by class score
        lower than the same images shuffled.
Returns:
    inception_score: Mean over the splits.
    inception_score_std: Standard deviation over the splits, 0 if there is one.
Examples:
    >>> inception_score = evaluate.load(metric_folder("inception_score"))
    >>> inception_score.compute(predictions=logits)
"""
CITATION = """\
@inproceedings{salimans2016improved,
    title={Improved Techniques for Training {GANs}},
    author={Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi},
    booktitle={Advances in Neural Information Processing Systems},
    year={2016}
}
"""


class InceptionScore(FeatureMetric):
    description = (
        "Exponential of the mean divergence of each image's predicted classes from those of all images, in "
        "consecutive splits. The inputs are logits: Inception's 1008 without the bias, or those of any "
        "classifier. There are no references."
    )
    layer, inputs = "logits", ("predictions",)
    usage, citation = USAGE, CITATION
    reference_urls = ("https://arxiv.org/abs/1606.03498",)

    def _compute(self, predictions: Any, split_size: int = 5000) -> dict[str, float]:
        mean, deviation = inception_score(feature_tensor("predictions", predictions), split_size)
        return {"inception_score": mean, "inception_score_std": deviation}
