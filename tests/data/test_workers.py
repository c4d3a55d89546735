"""Data workers begin in any way that Python starts processes, outlive a stop signal, and end with their process."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch

from maetok_hf.data import HeldOutImages, StreamingImages


def stream(source, num_workers):
    return StreamingImages(source, resolution=8, batch_size=2, seed=3, num_workers=num_workers, num_streams=2)


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_a_worker_that_inherits_nothing_yields_the_same_batches(make_source):
    source = make_source("parquet")
    expected = list(itertools.islice(stream(source, 0).dataloader(), 6))
    loader = stream(source, 1).dataloader()
    loader.multiprocessing_context = "forkserver"  # what Python starts processes by from 3.14 on
    assert_equal(list(itertools.islice(loader, 6)), expected)


@pytest.mark.parametrize("kind_of_loader", ["training", "held out"])
def test_a_stop_signal_to_the_workers_does_not_end_the_iteration(make_source, kind_of_loader):
    source = make_source()

    def loader(num_workers):
        if kind_of_loader == "training":
            return stream(source, num_workers).dataloader()
        return HeldOutImages(source, resolution=8, batch_size=2).dataloader(num_workers)

    expected = list(itertools.islice(loader(0), 20))
    before = set(multiprocessing.active_children())
    batches = iter(loader(2))
    received = [next(batches), next(batches)]  # one of each worker: both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    received += itertools.islice(batches, 18)
    assert_equal(received, expected)
    assert all(worker.is_alive() or worker.exitcode == 0 for worker in workers)


LEAVES_A_LOADER_OPEN = """
import multiprocessing
import numpy as np
from maetok_hf.data import ImageColumns, ImageSource, StreamingImages
from maetok_hf.data.sources import Row


class Gray(ImageSource):
    def read_chunk(self, chunk):
        return [Row(np.zeros((8, 8, 3), dtype=np.uint8))] * 8


if __name__ == "__main__":
    source = Gray("gray images", ImageColumns("image"), [(0, 8)] * 4)
    batches = iter(StreamingImages(source, resolution=8, batch_size=2, seed=0, num_workers=2).dataloader())
    next(batches), next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    raise RuntimeError("the run failed")
"""


def test_workers_end_with_a_process_that_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LEAVES_A_LOADER_OPEN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: the run failed\n"), done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
