"""Rows of files are counted by one process at a time, and what is counted is kept."""

import gzip
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from maetok_hf.data import open_images
from maetok_hf.data.sources import StreamSource, TarSource, count_stream


@pytest.fixture
def counted(monkeypatch):
    """Files that are counted, by this process and those that it forks."""
    log = multiprocessing.get_context("fork").SimpleQueue()
    count = TarSource.count

    def recording(file, *arguments):
        log.put(Path(file).name)
        time.sleep(0.2)
        return count(file, *arguments)

    monkeypatch.setattr(TarSource, "count", staticmethod(recording))

    def names():
        found = []
        while not log.empty():
            found.append(log.get())
        return sorted(found)

    return names


@pytest.fixture
def folder(make_source, tmp_path):
    make_source("webdataset")
    for cached in (tmp_path / "counts").iterdir():
        cached.unlink()
    return tmp_path / "webdataset"


FILES = [f"train-{shard:03d}.tar" for shard in range(3)]


def test_of_processes_that_open_the_same_files_one_counts(folder, tmp_path, counted):
    context = multiprocessing.get_context("fork")
    sizes = context.SimpleQueue()

    def open_and_tell():
        sizes.put(len(open_images(folder, cache_dir=tmp_path / "counts")))

    processes = [context.Process(target=open_and_tell) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [sizes.get() for _ in processes] == [61] * 3
    assert counted() == FILES
    assert [path.suffix for path in (tmp_path / "counts").iterdir()] == [".json"], "no lock is left"


def test_a_process_that_dies_while_it_counts_lets_the_next_in(folder, tmp_path, counted):
    context = multiprocessing.get_context("fork")
    first = context.Process(target=lambda: open_images(folder, cache_dir=tmp_path / "counts"))
    first.start()
    while not list((tmp_path / "counts").glob("*.lock")):
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join()
    assert len(open_images(folder, cache_dir=tmp_path / "counts")) == 61
    assert [path.suffix for path in (tmp_path / "counts").iterdir()] == [".json"]


def test_files_that_are_counted_are_not_counted_again_after_a_failure(folder, tmp_path, counted, monkeypatch):
    count = TarSource.count
    broken = [True]

    def breaking(file, *arguments):
        if broken[0] and file.endswith(FILES[2]):
            raise ConnectionResetError("connection lost")
        return count(file, *arguments)

    monkeypatch.setattr(TarSource, "count", staticmethod(breaking))
    with pytest.raises(OSError, match="connection lost"):
        open_images(folder, cache_dir=tmp_path / "counts")
    assert counted() == FILES[:2]
    broken[0] = False
    assert len(open_images(folder, cache_dir=tmp_path / "counts")) == 61
    assert counted() == FILES[2:]


def test_counts_are_kept_while_the_counting_goes_on(make_source, tmp_path, monkeypatch):
    monkeypatch.setattr("maetok_hf.data.opening._SECONDS_BETWEEN_SAVES", -1.0)
    count, calls, kept = TarSource.count, [], []

    def waiting(file, *arguments):
        calls.append(file)
        if len(calls) == 3:  # the counting thread is ahead of the one that keeps its counts: let that one catch up
            deadline = time.monotonic() + 60
            while not kept and time.monotonic() < deadline:
                kept.extend(json.loads(path.read_text()) for path in (tmp_path / "counts").glob("*.json"))
                time.sleep(0.01)
        return count(file, *arguments)

    monkeypatch.setattr(TarSource, "count", staticmethod(waiting))
    monkeypatch.setattr("maetok_hf.data.sources.NUM_THREADS", 1)
    assert make_source("webdataset").num_rows == 61
    [[first, _, third]] = kept
    assert first["num_rows"] == 15 and third is None


def test_a_stream_that_must_be_read_to_be_counted_is_read_once(tmp_path, toy, monkeypatch):
    toy.write_tar(tmp_path / "all.tar", [(f"{index}.png", toy.png(index)) for index in range(9)])
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress((tmp_path / "all.tar").read_bytes()))
    passes = []
    monkeypatch.setattr(
        "maetok_hf.data.opening.count_stream", lambda *arguments: (passes.append(1), count_stream(*arguments))[1]
    )
    for _ in range(2):
        source = open_images(
            "webdataset", data_files=str(tmp_path / "all.tar.gz"), chunk_size=4, cache_dir=tmp_path / "counts"
        )
        assert isinstance(source, StreamSource) and source.num_rows == 9
    assert len(passes) == 1
    assert [path.suffix for path in (tmp_path / "counts").iterdir()] == [".json"]
