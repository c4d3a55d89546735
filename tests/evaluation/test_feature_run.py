"""A collection that was killed anywhere, and continued by any number of processes, is that of one process."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch

from maetok_hf.evaluation import FeatureCollector, NpzImages, collect_features, feature_run
from maetok_hf.evaluation.feature_run import FeatureRun
from maetok_hf.training.interruption import RunLock, StopRequest
from tests.evaluation.networks import TinyExtractor, random_images


COUNT = 41
PROTOCOL = {"extractor": "tiny", "images": {"digest": "1"}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, random_images(COUNT).permute(0, 2, 3, 1).numpy())
    return NpzImages(path)


@pytest.fixture(scope="module")
def whole(images):
    collector = FeatureCollector(COUNT)
    collect_features(images, TinyExtractor(), collector, batch_size=4)
    return collector


@pytest.fixture(autouse=True)
def save_every_batch(monkeypatch):
    monkeypatch.setattr(feature_run, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(feature_run, "SAVES_APART", 0.0)


class Fault(Exception):
    pass


def counting(extractor, fault_at=None):
    """An extractor that remembers how many images it saw, and fails at some batch."""

    def extract(batch):
        if extract.num_batches == fault_at:
            raise Fault
        extract.num_batches += 1
        extract.num_images += len(batch)
        return extractor(batch)

    extract.num_batches = extract.num_images = 0
    return extract


def make_runs(folder, world_size, protocol=PROTOCOL, **layers):
    """The runs of all processes of one attempt, in this process."""
    shared = []

    def share(value):
        shared.append(value)
        return shared[0]

    arguments = {"world_size": world_size, "share": share, **layers}
    return [FeatureRun(folder, COUNT, protocol, rank=rank, **arguments) for rank in range(world_size)]


def complete(folder, images, world_size, extractor):
    runs = make_runs(folder, world_size)
    for run in reversed(runs):
        run.collect(images, extractor, batch_size=4)
    return runs[0].result()


def assert_same(collector, whole):
    for layer in ("pool", "spatial"):
        found, expected = collector.moments(layer), whole.moments(layer)
        assert found.num_samples == COUNT
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-10, atol=1e-14)
    for layer in ("pool", "logits"):
        assert torch.equal(collector.features(layer), whole.features(layer))


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_processes_give_what_one_gives(tmp_path, images, whole, world_size):
    extractor = counting(TinyExtractor())
    assert_same(complete(tmp_path, images, world_size, extractor), whole)
    assert extractor.num_images == COUNT
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


@pytest.mark.parametrize("faults,world_size", [([3], 1), ([0, 2], 1), ([1, 3], 3), ([1, 1, 2], 2), ([2, 2], 2)])
def test_parts_of_a_killed_attempt_are_continued_by_any_number_of_processes(
    tmp_path, images, whole, faults, world_size
):
    for run, fault_at in zip(make_runs(tmp_path, len(faults)), faults, strict=True):
        with pytest.raises(Fault):
            run.collect(images, counting(TinyExtractor(), fault_at), batch_size=4)
    parts = {path: path.read_bytes() for path in tmp_path.glob("*/part-*")}
    assert len(parts) == sum(fault > 0 for fault in faults)
    extractor = counting(TinyExtractor())
    # a second attempt is killed as well, and leaves the parts of the first one as they are
    for run in make_runs(tmp_path, world_size):
        assert run.num_missing == COUNT - 4 * sum(faults)
        with pytest.raises(Fault):
            run.collect(images, counting(extractor, 1), batch_size=4)
    assert {path: path.read_bytes() for path in parts} == parts
    assert_same(complete(tmp_path, images, world_size, extractor), whole)
    assert extractor.num_images == COUNT - 4 * sum(faults)


def test_a_kill_while_the_parts_are_joined_costs_nothing(tmp_path, images, whole, monkeypatch):
    runs = make_runs(tmp_path, 2)
    for run in runs:
        run.collect(images, TinyExtractor(), batch_size=4)
    with monkeypatch.context() as patch:  # before the result is there
        patch.setattr(FeatureCollector, "save", lambda *arguments: (_ for _ in ()).throw(Fault))
        with pytest.raises(Fault):
            runs[0].result()
    assert len(list(tmp_path.glob("*/part-*"))) == 2
    runs = make_runs(tmp_path, 1)
    assert runs[0].num_missing == 0
    with monkeypatch.context() as patch:  # after that, before the parts are removed
        patch.setattr(FeatureRun, "_remove_parts", lambda self: (_ for _ in ()).throw(Fault))
        with pytest.raises(Fault):
            runs[0].result()
    assert len(list(tmp_path.glob("*/part-*"))) == 2
    (tmp_path / ".features.npz.1.tmp").write_bytes(b"half")
    extractor = counting(TinyExtractor())
    assert_same(complete(tmp_path, images, 3, extractor), whole)
    assert extractor.num_images == 0
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


def test_a_result_is_read_again_and_can_be_removed(tmp_path, images, whole):
    complete(tmp_path, images, 1, TinyExtractor())
    extractor = counting(TinyExtractor())
    assert_same(complete(tmp_path, images, 2, extractor), whole)
    assert extractor.num_images == 0
    (run,) = make_runs(tmp_path, 1)
    assert run.seconds_per_image is None
    run.remove()
    assert make_runs(tmp_path, 1)[0].num_missing == COUNT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_what_was_counted(tmp_path, images, whole, monkeypatch, capsys, number):
    monkeypatch.setattr(feature_run, "SECONDS_BETWEEN_SAVES", 1000.0)
    (run,) = make_runs(tmp_path, 1)
    extractor = TinyExtractor()

    calls = itertools.count(1)

    def signalling(batch):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return extractor(batch)

    stop = StopRequest()
    try:
        with pytest.raises(SystemExit) as caught:
            run.collect(images, signalling, batch_size=4, stop=stop)
    finally:
        stop.release()
    assert caught.value.code == 128 + number
    assert "the same command continues" in capsys.readouterr().out
    rest = counting(extractor)
    assert_same(complete(tmp_path, images, 1, rest), whole)
    assert rest.num_images == COUNT - 12


def test_saves_are_rare(tmp_path, images, monkeypatch):
    monkeypatch.setattr(feature_run, "SECONDS_BETWEEN_SAVES", 1000.0)
    saves = []
    save = FeatureCollector.save
    monkeypatch.setattr(FeatureCollector, "save", lambda *arguments: (saves.append(arguments), save(*arguments)))
    (run,) = make_runs(tmp_path, 1)
    run.collect(images, TinyExtractor(), batch_size=4)
    assert len(saves) == 1
    assert run.seconds_per_image > 0


def test_the_main_process_waits_for_the_others(tmp_path, images, whole, monkeypatch):
    monkeypatch.setattr(feature_run, "SECONDS_BETWEEN_LOOKS", 0.01)
    runs = make_runs(tmp_path, 2)
    runs[0].collect(images, TinyExtractor(), batch_size=4)
    other = threading.Timer(0.3, runs[1].collect, (images, TinyExtractor(), 4))
    other.start()
    assert_same(runs[0].result(), whole)
    other.join()


def test_other_protocols_and_layers_are_refused(tmp_path, images):
    (run,) = make_runs(tmp_path, 1)
    with pytest.raises(Fault):
        run.collect(images, counting(TinyExtractor(), 2), batch_size=4)
    with pytest.raises(ValueError, match=r"part-0001\.npz belongs to a run with .*\n  images.digest: '1'"):
        make_runs(tmp_path, 1, {"extractor": "tiny", "images": {"digest": "2"}})
    with pytest.raises(ValueError, match=r"layers.keep: \['pool', 'logits'\] there, \['pool'\] now"):
        make_runs(tmp_path, 1, keep=("pool",))
    complete(tmp_path, images, 1, TinyExtractor())
    with pytest.raises(ValueError, match=r"features\.npz belongs to a run with other settings"):
        make_runs(tmp_path, 1, {"extractor": "other"})


def test_damaged_parts_and_images_that_two_parts_have_are_named(tmp_path, images):
    (run,) = make_runs(tmp_path, 1)
    run.collect(images, TinyExtractor(), batch_size=4)
    (part,) = tmp_path.glob("*/part-*")
    (tmp_path / "process-0007").mkdir()
    copy = tmp_path / "process-0007" / part.name
    copy.write_bytes(part.read_bytes())
    with pytest.raises(ValueError, match="process-0007.* has images that another part"):
        make_runs(tmp_path, 1)
    copy.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged .*: remove it"):
        make_runs(tmp_path, 1)
    copy.unlink()
    assert make_runs(tmp_path, 1)[0].num_missing == 0


def test_a_process_of_an_earlier_attempt_that_lives_is_waited_for(tmp_path, images, monkeypatch):
    monkeypatch.setattr(feature_run, "RunLock", partial(RunLock, patience=0.2))
    folder = tmp_path / "process-0001"
    folder.mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    command = [sys.executable, "-c", code, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="process-0001 is in use by another process"):
            make_runs(tmp_path, 1)
        process.stdin.close()
        process.wait()
    assert make_runs(tmp_path, 1)[0].num_missing == COUNT
