"""A reference is known by all of its numbers, and says what it lacks."""

import pytest
import torch

from maetok_hf.evaluation import FeatureCollector, Moments, NpzImages
from maetok_hf.evaluation.reference import Reference
from maetok_hf.sampling import write_npz
from tests.evaluation.networks import TinyExtractor, random_images


def moments(scale=1.0, count=5):
    return Moments(torch.zeros(2, dtype=torch.float64), scale * torch.eye(2, dtype=torch.float64), count)


def collected(count=6):
    collector = FeatureCollector(count, ("pool",), ("pool",))
    collector.update(range(count), TinyExtractor()(random_images(count)))
    return collector


def test_identity_sees_means_covariances_and_counts():
    kinds = (moments(), moments(2.0), moments(1.0, 9))
    identities = [Reference("x", known={"pool": value}).identity for value in kinds]
    assert len({str(identity) for identity in identities}) == 3
    assert Reference("elsewhere", known={"pool": moments()}).identity == identities[0]


def test_what_a_file_lacks_is_computed_of_its_images(tmp_path):
    images = random_images(5).permute(0, 2, 3, 1).numpy()
    write_npz(tmp_path / "a.npz", images, images.shape, torch.zeros(5).numpy())
    adm = Reference("adm", known={"pool": moments(), "spatial": moments()}, images=NpzImages(tmp_path / "a.npz"))
    assert adm.missing(["pool", "spatial"], []) == ([], [])
    assert adm.missing(["pool"], ["pool"]) == ([], ["pool"])
    assert adm.num_images == 5
    alone = Reference("statistics", known={"pool": moments()})
    assert alone.num_images is None
    with pytest.raises(ValueError, match="lacks statistics of 'spatial' and features of 'pool'"):
        alone.missing(["pool", "spatial"], ["pool"])


def test_statistics_of_a_file_count_before_those_of_its_images():
    reference = Reference("adm", known={"pool": moments(count=None)})
    reference.add(collected())
    assert reference.moments("pool").num_samples is None
    assert reference.counts(["pool"], ["pool"]) == (None, 6)
    assert reference.features("pool").shape == (6, 12)
