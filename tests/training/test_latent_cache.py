"""Cached latents: encoded once, complete or absent, and in an order that depends on the seed alone."""

import shutil
from collections import namedtuple
from itertools import islice

import pytest
import torch

from maetok_hf.training.latent_cache import LatentCache


NUM_ROWS, SHAPE = 23, (2, 3)
UNUSABLE = {4, 11}  # a corrupt image is not among the batches; a missing label is -1


def images_of(rows):
    """An image whose mean is its row, with another row of pixels on its left."""
    images = torch.zeros(len(rows), 1, 2, 2, dtype=torch.uint8)
    images[..., 1] = rows[:, None, None]
    return images


def encode(images):
    """Left column minus right column: differs for a mirrored image."""
    difference = (images[..., 0].float() - images[..., 1].float()).mean(dim=(1, 2))
    return difference[:, None, None].expand(-1, *SHAPE)


def batches():
    for rows in torch.arange(NUM_ROWS).split(5):
        rows = torch.tensor([row for row in rows.tolist() if row != 4])
        labels = torch.where(rows == 11, -1, rows % 10)
        yield {"images": images_of(rows), "class_labels": labels, "indices": rows}


@pytest.fixture
def make_cache(tmp_path):
    def make(num_views=2, identity="one"):
        folder = tmp_path / f"latents-{num_views}"
        LatentCache.allocate(folder, NUM_ROWS, num_views, SHAPE)
        LatentCache.fill(folder, batches(), encode)
        LatentCache.complete(folder, {"identity": identity})
        return LatentCache(folder), folder

    return make


def take(cache, count, **changes):
    settings = {
        "batch_size": 2,
        "seed": 0,
        "rank": 0,
        "world_size": 1,
        "gradient_accumulation_steps": 1,
        "start_micro_batch": 0,
    }
    return list(islice(cache.micro_batches(**(settings | changes)), count))


def test_every_usable_image_comes_once_an_epoch_with_its_own_latent_and_label(make_cache):
    cache, _ = make_cache(num_views=1)
    assert cache.num_images == NUM_ROWS - len(UNUSABLE)
    epoch = take(cache, 10)
    rows = torch.cat([batch["indices"] for batch in epoch])
    assert len(rows.unique()) == len(rows) == 20
    assert not UNUSABLE & set(rows.tolist())
    for batch in epoch:
        assert batch["latents"].shape == (2, *SHAPE)
        assert torch.equal(batch["latents"], encode(images_of(batch["indices"])))
        assert torch.equal(batch["class_labels"], batch["indices"] % 10)


def test_order_differs_between_epochs_and_seeds_and_repeats_for_the_same(make_cache):
    cache, _ = make_cache()

    def order(count, **changes):
        return torch.cat([batch["indices"] for batch in take(cache, count, **changes)]).tolist()

    two_epochs = order(20)
    assert two_epochs[:20] != two_epochs[20:]
    assert order(10) != order(10, seed=1)
    assert order(20) == two_epochs


def test_mirror_images_are_drawn_for_each_epoch_and_image(make_cache):
    cache, _ = make_cache()
    for batch in take(cache, 10):
        plain = encode(images_of(batch["indices"]))
        assert ((batch["latents"] == plain) | (batch["latents"] == -plain)).all()
    signs = [batch["latents"].sign().flatten() for batch in take(cache, 10)]
    assert len(torch.cat(signs).unique()) >= 2


def test_processes_and_accumulation_divide_the_same_micro_batches(make_cache):
    cache, _ = make_cache()
    alone = take(cache, 20, gradient_accumulation_steps=2)
    for rank in range(2):
        share = take(cache, 10, rank=rank, world_size=2)
        for batch, expected in zip(share, alone[rank::2], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("start", [1, 9, 10, 13])
def test_stream_continues_at_any_micro_batch(make_cache, start):
    cache, _ = make_cache()
    whole = take(cache, 20)
    for batch, expected in zip(take(cache, 20 - start, start_micro_batch=start), whole[start:], strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_interrupted_or_other_cache_is_not_taken_for_this_one(make_cache, tmp_path):
    _, folder = make_cache(identity="one")
    assert LatentCache.is_complete(folder, {"identity": "one"})
    assert not LatentCache.is_complete(folder, {"identity": "two"})
    other = tmp_path / "other"
    LatentCache.allocate(other, NUM_ROWS, 1, SHAPE)
    LatentCache.fill(other, batches(), encode)
    assert not LatentCache.is_complete(other, {"identity": "one"})
    assert not other.exists()


def test_too_little_room_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(OSError, match=r"The latents need .* GiB .*make room"):
        LatentCache.allocate(tmp_path / "latents", NUM_ROWS, 2, SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_fewer_images_than_a_batch_is_an_error(make_cache):
    cache, _ = make_cache()
    with pytest.raises(ValueError, match="21 images, fewer than one global batch of 30"):
        take(cache, 1, batch_size=30)


def test_cache_without_any_class_is_an_error(tmp_path):
    folder = tmp_path / "latents"
    LatentCache.allocate(folder, NUM_ROWS, 1, SHAPE)
    LatentCache.complete(folder, {})
    with pytest.raises(ValueError, match="no image with a valid class"):
        LatentCache(folder)
