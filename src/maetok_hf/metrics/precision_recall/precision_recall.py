"""Improved precision and recall of a set of images, for `evaluate`."""

from typing import Any

from maetok_hf.evaluation import precision_recall
from maetok_hf.metrics.feature_metric import FeatureMetric, feature_tensor


USAGE = """
    num_neighbors: The radius of a sample's ball is the distance to its neighbor of this rank, 3 by default.
    device: Where distances are computed, "cpu" by default.
Returns:
    precision: Part of the predictions that lie in the ball of a reference.
    recall: Part of the references that lie in the ball of a prediction.
Examples:
    >>> precision_recall = evaluate.load(metric_folder("precision_recall"))
    >>> precision_recall.compute(predictions=generated, references=real)
"""
CITATION = """\
@inproceedings{kynkaanniemi2019improved,
    title={Improved Precision and Recall Metric for Assessing Generative Models},
    author={Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
    booktitle={Advances in Neural Information Processing Systems},
    year={2019}
}
"""


class PrecisionRecall(FeatureMetric):
    description = (
        "How much of a set of generated images lies among the real ones (precision) and how much of the real ones "
        "lies among the generated ones (recall), by distances to the k-th neighbor in the features of a network. Both "
        "depend on the sizes of the sets: ADM's numbers have 50 000 generated and 10 000 reference images."
    )
    usage, citation = USAGE, CITATION
    reference_urls = ("https://arxiv.org/abs/1904.06991",)

    def _compute(
        self, predictions: Any, references: Any, num_neighbors: int = 3, device: str = "cpu"
    ) -> dict[str, float]:
        generated, real = feature_tensor("predictions", predictions), feature_tensor("references", references)
        precision, recall = precision_recall(generated, real, num_neighbors, device=device)
        return {"precision": precision, "recall": recall}
