"""Exactly N images, each once: on any number of processes, killed and run again, in any order."""

import itertools

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.evaluation import FeatureCollector, FolderImages, collect_features, frechet_distance
from tests.evaluation.networks import TinyExtractor, random_images


COUNT = 41


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(random_images(COUNT)):
        PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
    return FolderImages(folder)


@pytest.fixture(scope="module")
def whole(images):
    collector = FeatureCollector(COUNT)
    collect_features(images, TinyExtractor(), collector, batch_size=COUNT)
    return collector


def assert_same(collector, whole):
    for layer in ("pool", "spatial"):
        found, expected = collector.moments(layer), whole.moments(layer)
        assert found.num_samples == COUNT
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-5, atol=1e-8)
        assert frechet_distance(found, expected) < 1e-9
    for layer in ("pool", "logits"):
        torch.testing.assert_close(collector.features(layer), whole.features(layer))


def test_the_test_extractor_does_not_collapse(whole):
    assert whole.features("pool").std(dim=0).median() > 0.02
    assert whole.features("logits").argmax(dim=1).unique().numel() > 1
    other = FeatureCollector(30)
    other.update(range(30), TinyExtractor()(random_images(30, seed=1) // 2))
    assert frechet_distance(other.moments("pool"), whole.moments("pool")) > 0.01


def test_statistics_and_kept_features_are_those_of_the_images(images, whole):
    expected = TinyExtractor()(images.read(range(COUNT)))
    assert torch.equal(whole.features("pool"), expected["pool"])
    assert torch.equal(whole.features("logits"), expected["logits"])
    covariance = np.cov(expected["spatial"].double().numpy(), rowvar=False)
    np.testing.assert_allclose(whole.moments("spatial").covariance, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size,batch_size", [(1, 1), (1, 7), (2, 4), (3, 5), (8, 20)])
def test_processes_together_give_what_one_gives(images, whole, world_size, batch_size):
    parts = []
    for rank in range(world_size):
        parts.append(FeatureCollector(COUNT))
        collect_features(images, TinyExtractor(), parts[-1], batch_size, rank, world_size)
    merged = FeatureCollector.merged(reversed(parts))
    assert_same(merged, whole)


class Killed(Exception):
    pass


@pytest.mark.parametrize("batches_before,world_size_after", [(0, 1), (3, 1), (3, 2), (9, 1)])
def test_a_killed_run_continues_and_gives_the_same(images, whole, tmp_path, batches_before, world_size_after):
    protocol = {"extractor": "tiny", "images": [1, 2]}
    first, done = FeatureCollector(COUNT), itertools.count(1)

    def save_or_die(count):
        if next(done) > batches_before:
            raise Killed  # after the images were counted, before they were saved
        first.save(tmp_path / "state.npz", protocol)

    first.save(tmp_path / "state.npz", protocol)
    with pytest.raises(Killed):
        collect_features(images, TinyExtractor(), first, batch_size=4, on_batch=save_or_die)
    saved = FeatureCollector.load(tmp_path / "state.npz", protocol)
    assert saved.seen.sum() == 4 * batches_before
    parts = [saved] + [FeatureCollector(COUNT) for _ in range(world_size_after - 1)]
    seen = saved.seen.copy()
    for rank, part in enumerate(parts):
        collect_features(images, TinyExtractor(), part, 6, rank, world_size_after, seen=seen)
    assert_same(FeatureCollector.merged(parts), whole)


def test_saved_state_is_read_bit_by_bit(whole, tmp_path):
    whole.save(tmp_path / "state.npz", {})
    loaded = FeatureCollector.load(tmp_path / "state.npz", {})
    for layer in ("pool", "spatial"):
        for found, expected in zip(loaded.moments(layer), whole.moments(layer), strict=True):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert torch.equal(loaded.features("logits"), whole.features("logits"))


def test_state_of_another_protocol_is_refused(whole, tmp_path):
    whole.save(tmp_path / "state.npz", {"extractor": "tiny"})
    with pytest.raises(ValueError, match="features of another protocol.*tiny.*there and.*other.*now"):
        FeatureCollector.load(tmp_path / "state.npz", {"extractor": "other"})


def test_no_image_is_counted_twice():
    features = TinyExtractor()(random_images(4))
    collector = FeatureCollector(10)
    collector.update(range(4), features)
    for rows, twice in ((range(3, 7), 3), ([5, 6, 5, 7], 5)):
        with pytest.raises(ValueError, match=f"image {twice} .1 in all. would be counted twice"):
            collector.update(rows, features)
    other = FeatureCollector(10)
    other.update([9, 2, 8, 7], features)
    with pytest.raises(ValueError, match="image 2 .* would be counted twice"):
        collector.merge(other)
    with pytest.raises(ValueError, match="`rows` must be from 0 to 9, got 7 to 10"):
        collector.update(range(7, 11), features)
    assert collector.seen.sum() == 4


def test_no_image_is_forgotten(images):
    collector = FeatureCollector(COUNT)
    collect_features(images, TinyExtractor(), collector, 8, rank=1, world_size=2)
    with pytest.raises(ValueError, match=f"24 of {COUNT} images were not counted, the first is image 0"):
        collector.moments("pool")
    with pytest.raises(ValueError, match="were not counted"):
        collector.features("pool")
    with pytest.raises(ValueError, match=f"`collector` is for 40 images, but folder .* is read for {COUNT}"):
        collect_features(images, TinyExtractor(), FeatureCollector(40), 8)


def test_layers_that_an_extractor_lacks_are_named():
    features = TinyExtractor()(random_images(4))
    del features["spatial"]
    with pytest.raises(ValueError, match=r"gives 'pool', 'logits', but not \['spatial'\]"):
        FeatureCollector(4).update(range(4), features)
    collector = FeatureCollector(4, statistics=("pool",), keep=())
    collector.update(range(4), features)
    assert collector.moments("pool").num_samples == 4
    with pytest.raises(ValueError, match=r"gave 'pool' of shape \(4, \d+\) for 3 images"):
        FeatureCollector(4, statistics=("pool",), keep=()).update(range(3), features)
    with pytest.raises(ValueError, match="must be of the same layers"):
        collector.merge(FeatureCollector(4))
    with pytest.raises(ValueError, match="`num_images` must be positive, got 0"):
        FeatureCollector(0)


def test_progress_counts_every_image_once(images):
    counts = []
    collect_features(images, TinyExtractor(), FeatureCollector(COUNT), 9, on_batch=counts.append)
    assert counts == [9, 9, 9, 9, 5]
