import pytest
import torch

from maetok_hf.data import StreamingImages
from maetok_hf.data.loader import ImageSlots


SHAPE = (2, 3, 4, 4)
NUM_BYTES = 2 * 3 * 4 * 4


def put(slots, worker, value, shape=SHAPE):
    """What a worker sends for a batch of one value."""
    batch = {"images": slots.claim(worker, shape).fill_(value), "indices": torch.tensor([value]), "epoch": value}
    return slots.pack(batch, worker)


def lent(slots):
    return slots.lent.tolist()


def test_a_batch_comes_out_as_it_was_put_in():
    slots = ImageSlots(2, 2, NUM_BYTES)
    packed = [put(slots, 0, 1), put(slots, 1, 2), put(slots, 1, 3, (1, 3, 2, 2))]
    for value, batch in enumerate([slots.unpack(batch) for batch in packed], start=1):
        assert batch["images"].shape == (SHAPE if value < 3 else (1, 3, 2, 2))
        assert batch["images"].eq(value).all() and batch["images"].is_contiguous()
        assert batch["indices"].tolist() == [value] and batch["epoch"] == value
        assert list(batch) == ["images", "indices", "epoch"]


def test_what_is_sent_holds_no_images():
    slots = ImageSlots(1, 1, NUM_BYTES)
    assert put(slots, 0, 1)["images"] == (0, 0, SHAPE)


def test_a_slot_is_free_again_when_the_batch_and_its_views_are_gone():
    slots = ImageSlots(1, 2, NUM_BYTES)
    batch = slots.unpack(put(slots, 0, 7))
    assert lent(slots) == [[1, 0]]
    view = batch["images"][1, :, 2:]
    del batch
    assert lent(slots) == [[1, 0]], "a view still shows it"
    assert view.eq(7).all()
    del view
    assert lent(slots) == [[0, 0]]


def test_a_slot_that_is_lent_is_never_written():
    slots = ImageSlots(1, 2, NUM_BYTES)
    kept = [slots.unpack(put(slots, 0, value))["images"] for value in range(6)]
    assert [image.unique().tolist() for image in kept] == [[value] for value in range(6)]


def test_workers_have_slots_of_their_own():
    slots = ImageSlots(2, 1, NUM_BYTES)
    first, second = put(slots, 0, 1), put(slots, 1, 2)
    assert (first["images"], second["images"]) == ((0, 0, SHAPE), (1, 0, SHAPE))


def test_a_worker_without_a_free_slot_sends_the_images_themselves():
    slots = ImageSlots(1, 1, NUM_BYTES)
    put(slots, 0, 1)
    packed = put(slots, 0, 2)
    assert isinstance(packed["images"], torch.Tensor) and packed["images"].eq(2).all()
    assert torch.equal(slots.unpack(packed)["images"], packed["images"])


def test_missing_shared_memory_is_reported_with_what_to_do(monkeypatch):
    def fail(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(OSError, match=r"2 MiB of shared memory.*2 data workers.*`prefetch_factor`.*/dev/shm"):
        ImageSlots(2, 1, 2**20)


def test_a_loader_whose_batches_are_let_go_needs_no_other_memory(make_source, monkeypatch):
    sent, unpack = [], ImageSlots.unpack
    monkeypatch.setattr(ImageSlots, "unpack", lambda self, packed: (sent.append(packed), unpack(self, packed))[1])
    images = StreamingImages(make_source(), resolution=8, batch_size=2, seed=0, num_workers=2)
    for _, batch in zip(range(20), images.dataloader(), strict=False):
        assert all(isinstance(batch[key], torch.Tensor) for key in ("images", "class_labels", "indices", "replaced"))
    assert len(sent) >= 20 and all(isinstance(packed["images"], tuple) for packed in sent)
    # torch passes each tensor by a connection and a mapping of its own, which is slow.
    assert not any(isinstance(value, torch.Tensor) for packed in sent for value in packed.values())


def test_pinned_copies_leave_the_slot_free(make_source, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    slots = ImageSlots(1, 1, NUM_BYTES)
    images = StreamingImages(make_source(), resolution=8, batch_size=2, seed=0, num_workers=2)
    received = put(slots, 0, 5) | {"problems": []}
    batch = next(images.dataloader(pin_memory=True)._unpacked(iter([received]), slots))
    assert lent(slots) == [[0]]
    assert batch["images"].eq(5).all() and batch["indices"].tolist() == [5] and batch["epoch"] == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tensors_are_pinned_by_the_loader_itself(make_source, monkeypatch, num_workers):
    pinned = []
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(tensor.shape), tensor.clone())[1])
    images = StreamingImages(make_source(), resolution=8, batch_size=2, seed=0, num_workers=num_workers)
    loader = images.dataloader(pin_memory=True)
    assert not loader.pin_memory, "the thread of torch makes lists of tuples in some versions"
    batch = next(iter(loader))
    tensors = [value.shape for value in batch.values() if isinstance(value, torch.Tensor)]
    assert sorted(pinned) == sorted(tensors) and len(tensors) == 5
