"""Latents in a data set on the Hub are streamed by its name, whatever happens to the connection."""

import itertools

import pytest
import torch
from huggingface_hub import HfApi

from maetok_hf.data import StreamingLatents, open_latents
from tests.data.latent_caches import write_cache
from tests.loopback_hub import READ_TOKEN, connect_clients, without_waiting


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*.parquet}\n---\n"


@pytest.fixture
def cache(hub, tmp_path):
    """A folder of latents that is a data set on the Hub, too."""
    write_cache(tmp_path / "cache", left_out=(3,))
    (tmp_path / "cache" / "README.md").write_text(CARD)
    HfApi().create_repo("latents", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/latents", repo_type="dataset", folder_path=tmp_path / "cache")
    return tmp_path / "cache"


def batches(place, **settings):
    stream = StreamingLatents(open_latents(place, **settings), batch_size=4, seed=1)
    return list(itertools.islice(stream, 30))  # two epochs


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in ("latents", "class_labels", "indices"):
            assert torch.equal(one[name], other[name]), name


def test_batches_are_those_of_the_folder(hub, cache):
    source = open_latents("user/latents")
    assert source.metadata == open_latents(cache).metadata
    assert hub.count("GET .*parquet") == 0  # nothing is read before it is needed
    assert_same(batches("user/latents"), batches(cache))


def test_a_revision_stays_what_it_was(hub, cache, tmp_path):
    HfApi().create_tag("user/latents", tag="v1", repo_type="dataset")
    write_cache(tmp_path / "other", num_images=90)
    (tmp_path / "other" / "README.md").write_text(CARD)
    HfApi().upload_folder(repo_id="user/latents", repo_type="dataset", folder_path=tmp_path / "other")
    assert_same(batches("user/latents", revision="v1"), batches(cache))
    assert open_latents("user/latents").num_rows == 90


def test_a_commit_during_a_run_changes_nothing(hub, cache):
    source = open_latents("user/latents")
    hub.repositories["datasets/user/latents"].commit("gone", {"data/train-00000-of-00004.parquet": None})
    stream = StreamingLatents(source, batch_size=4, seed=1)
    assert_same(list(itertools.islice(stream, 30)), batches(cache))


def test_a_private_data_set_needs_a_token(hub, cache, monkeypatch, tmp_path):
    hub.repositories["datasets/user/latents"].private = True
    with monkeypatch.context() as patch:
        connect_clients(patch, hub, tmp_path / "stranger", token=None)
        with pytest.raises(OSError, match="'user/latents' could not be opened.*private or gated.*hf auth login"):
            open_latents("user/latents")
        assert_same(batches("user/latents", token=READ_TOKEN), batches(cache))


def test_failures_that_pass_are_tried_again(hub, cache, monkeypatch):
    without_waiting(monkeypatch)
    source = open_latents("user/latents")
    hub.fail("GET .*resolve/.*parquet", 503, times=1)
    hub.fail("GET /lfs/", 429, times=1, headers={"Retry-After": "1"})
    hub.cut("GET .*resolve/.*parquet", times=1)
    hub.cut("GET /lfs/", times=2, after=50)
    stream = StreamingLatents(source, batch_size=4, seed=1)
    assert_same(list(itertools.islice(stream, 30)), batches(cache))
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize("fault", ["unavailable", "cut"])
def test_a_failure_that_stays_says_how_to_go_on(hub, cache, monkeypatch, fault):
    without_waiting(monkeypatch)
    source = open_latents("user/latents")
    if fault == "cut":
        hub.cut("GET .*(resolve|lfs)/")
    else:
        hub.fail("GET .*(resolve|lfs)/", 503)
    with pytest.raises(OSError, match="(?s)Reading the latents in 'user/latents' failed.*from the last checkpoint"):
        next(iter(StreamingLatents(source, batch_size=4, seed=1)))


def test_a_missing_file_is_found_before_the_first_row(hub, cache):
    hub.repositories["datasets/user/latents"].commit("gone", {"data/train-00001-of-00004.parquet": None})
    with pytest.raises(ValueError, match="1 of 4 files in .* are missing"):
        open_latents("user/latents")
