"""Latents on disk: what is written stays, whenever the process was killed."""

import pytest
import torch

from maetok_hf.analysis import stored_latents
from maetok_hf.analysis.stored_latents import LatentChunk, LatentFile
from tests.testing_utils import seeded_normal


def block(number, size, dtype=torch.float32):
    labels = torch.arange(size) + 10 * number
    return LatentChunk(number, seeded_normal(size, 2, 3, seed=number, dtype=dtype), labels, labels + 100, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_are_read_back_in_order(tmp_path, dtype):
    blocks = [block(0, 4, dtype), block(1, 0, dtype), block(3, 2, dtype)]
    for one in blocks:  # each by a process of its own
        LatentFile(tmp_path, "train", (2, 3), dtype).append(one)
    file = LatentFile(tmp_path, "train", (2, 3), dtype)
    assert (file.next_block, file.num_rows, file.num_unlabeled, file.complete) == (4, 6, 4, False)
    file.finish()
    assert LatentFile(tmp_path, "train", (2, 3), dtype).complete
    stored = file.read()
    assert stored.latents.dtype == dtype
    assert torch.equal(stored.latents, torch.cat([one.latents for one in blocks]))
    assert torch.equal(stored.labels, torch.cat([one.labels for one in blocks]))
    assert torch.equal(stored.indices, torch.cat([one.indices for one in blocks]))


@pytest.mark.parametrize("call", [1, 2])
def test_a_block_that_was_being_written_is_written_again(tmp_path, monkeypatch, call):
    file = LatentFile(tmp_path, "train", (2, 3), torch.float32)
    file.append(block(0, 4))
    synced = []

    def killed(descriptor):
        synced.append(descriptor)
        if len(synced) == call:  # after the latents, or after the classes, before the block counts
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stored_latents.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            file.append(block(1, 5))
    again = LatentFile(tmp_path, "train", (2, 3), torch.float32)
    assert (again.next_block, again.num_rows) == (1, 4)
    again.append(block(1, 3))
    stored = again.read()
    assert torch.equal(stored.latents, torch.cat([block(0, 4).latents, block(1, 3).latents]))
    assert torch.equal(stored.labels, torch.cat([block(0, 4).labels, block(1, 3).labels]))
