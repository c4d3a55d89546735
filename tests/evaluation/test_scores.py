"""What metrics need is known before anything is computed."""

import pytest

from maetok_hf.evaluation import FeatureCollector
from maetok_hf.evaluation.reference import Reference
from maetok_hf.evaluation.scores import (
    LABELS,
    check_counts,
    check_layers,
    compute_scores,
    needed_layers,
    needed_reference_layers,
)
from tests.evaluation.networks import TinyExtractor, random_images


ALL = ("fid", "sfid", "inception_score", "precision_recall", "kid", "kid_subsets")


def collected(count, seed=0):
    collector = FeatureCollector(count, ("pool", "spatial"), ("pool", "logits"))
    collector.update(range(count), TinyExtractor()(random_images(count, seed)))
    return collector


def test_layers_are_those_that_metrics_read():
    assert needed_layers(ALL) == (["pool", "spatial"], ["logits", "pool"])
    assert needed_layers(["inception_score"]) == ([], ["logits"])
    assert needed_reference_layers(ALL) == (["pool", "spatial"], ["pool"])
    assert needed_reference_layers(["inception_score"]) == ([], [])


def test_every_number_has_a_label_and_bears_the_name_of_its_features():
    reference = Reference("x", collected=collected(20, seed=1))
    for extractor, names in (("inception", {"fid", "sfid"}), ("dinov2", {"fd", "sfd"})):
        found = compute_scores(ALL, collected(20), reference, extractor=extractor, kid_subset_size=10)
        assert names < found.keys() <= LABELS.keys()


def test_missing_layers_are_named_with_the_metrics_that_need_them():
    check_layers(ALL, ("pool", "spatial", "logits"), "x")
    with pytest.raises(ValueError, match="`metrics` sfid, inception_score need the layers logits, spatial"):
        check_layers(ALL[:3], ("pool",), "x")


@pytest.mark.parametrize(
    "metric,num_images,num_reference",
    [("fid", 1, None), ("precision_recall", 3, 10), ("precision_recall", 10, 3), ("kid_subsets", 999, 1000)],
)
def test_too_few_images_are_refused(metric, num_images, num_reference):
    with pytest.raises(ValueError, match=f"`metrics` '{metric}' needs"):
        check_counts([metric], num_images, num_reference, 1000)
    check_counts([metric], 1000, None, 1000)
