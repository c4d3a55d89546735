import logging

import pytest
import torch

from maetok_hf.data import HeldOutImages


def collect(source, num_workers=0, **settings):
    images = HeldOutImages(source, **{"resolution": 9, "batch_size": 4, **settings})
    return list(images.dataloader(num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_rows_come_in_order(make_source, toy, kind, num_workers):
    batches = collect(make_source(kind), num_workers, num_samples=22)
    assert [len(batch["indices"]) for batch in batches] == [4, 4, 4, 4, 4, 2]
    assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(22))
    assert torch.cat([batch["class_labels"] for batch in batches]).tolist() == toy.labels(61)[:22]
    for index, image in enumerate(torch.cat([batch["images"] for batch in batches])):
        assert torch.equal(image, torch.from_numpy(toy.pixels(index)[:, 1:10].copy()).permute(2, 0, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_rows(make_source, world_size, num_workers):
    source = make_source()
    parts = [collect(source, num_workers, rank=rank, world_size=world_size) for rank in range(world_size)]
    indices = [torch.cat([batch["indices"] for batch in part]).tolist() for part in parts]
    assert sorted(sum(indices, [])) == list(range(61))
    assert indices[1][:4] == [4, 5, 6, 7] and indices[0][4] == 4 * world_size


def test_stacked_is_all_batches_as_one(make_source):
    images = HeldOutImages(make_source(), resolution=9, batch_size=7, num_samples=20)
    stacked = images.stacked()
    assert stacked["images"].shape == (20, 3, 9, 9) and stacked["images"].dtype == torch.uint8
    assert stacked["indices"].tolist() == list(range(20))
    for key in stacked.keys() - {"counts"}:
        assert torch.equal(stacked[key], torch.cat([batch[key] for batch in images]))


def test_a_corrupt_image_is_left_out_and_reported(make_source, toy, caplog):
    images = [b"no image" if index in (1, 4, 5) else toy.png(index) for index in range(8)]
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        batches = collect(make_source(images=images), batch_size=2)
    assert [batch["indices"].tolist() for batch in batches] == [[0], [2, 3], [6, 7]]
    assert all(f"Row {index} of" in caplog.text for index in (1, 4, 5))


def test_no_usable_image_is_an_error(make_source):
    with pytest.raises(ValueError, match="no usable image"):
        HeldOutImages(make_source(images=[b"no image"] * 3), resolution=8, batch_size=2).stacked()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 0), ("num_samples", 0), ("num_samples", 62), ("rank", 1), ("world_size", 0), ("source", 3)],
)
def test_bad_arguments_are_named(make_source, argument, value):
    settings = {"source": make_source(), "resolution": 8, "batch_size": 2, argument: value}
    with pytest.raises(ValueError, match=f"`{argument}"):
        HeldOutImages(**settings)
