import errno
import logging

import pytest

from maetok_hf.data import HeldOutImages, StreamingImages, open_images
from maetok_hf.data.explain import is_disk_full, opening, reading


def chained(error, cause):
    try:
        raise error from cause
    except type(error) as raised:
        return raised


def fail_with(error):
    def fail(*arguments, **options):
        raise error

    return fail


DISK_FULL = OSError(errno.ENOSPC, "No space left on device", "/cache/file")
HTTP_ERROR = type("ConnectError", (Exception,), {"__module__": "httpx2"})("Name or service not known")
GATED = type("GatedRepoError", (OSError,), {})("403 Client Error. Access to dataset someone/images is restricted")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (DISK_FULL, "No space left.*disk is full: free some space.*HF_HOME"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota exceeded.*free some space"),
        (chained(ConnectionError("could not save"), DISK_FULL), "free some space"),
        (GATED, "is gated: accept its terms at .*datasets/someone/images .*`hf auth login`.*HF_TOKEN"),
        (FileNotFoundError("'someone/images' is a gated dataset on the Hub."), "is gated: accept its terms"),
        (
            ConnectionError("Couldn't reach 'someone/images' on the Hub"),
            "cannot be reached: check the connection.*path",
        ),
        (TimeoutError("timed out"), "cannot be reached"),
        (chained(OSError("no index"), ConnectionResetError("reset by peer")), "cannot be reached"),
        (HTTP_ERROR, "ConnectError: Name or service not known"),
        (FileNotFoundError("someone/images doesn't exist on the Hub"), "check the path.*spelling.*private or gated"),
    ],
)
def test_what_keeps_a_data_set_closed_is_said_with_what_to_do(monkeypatch, error, advice):
    monkeypatch.setattr("datasets.load_dataset_builder", fail_with(error))
    with pytest.raises(OSError, match="(?s)'someone/images' could not be opened.*" + advice) as raised:
        open_images("someone/images")
    assert raised.value.__cause__ is error
    assert is_disk_full(raised.value) == ("free some space" in advice)


def test_only_a_full_disk_is_a_full_disk():
    assert is_disk_full(DISK_FULL) and is_disk_full(chained(ValueError("no"), DISK_FULL))
    assert not is_disk_full(OSError(errno.EACCES, "denied")) and not is_disk_full(ValueError("No space left"))


@pytest.mark.parametrize("explained", [opening, reading])
def test_errors_of_code_and_data_are_left_alone(explained):
    with pytest.raises(ValueError, match="^not an image column$"), explained("someone/images"):
        raise ValueError("not an image column")


def test_a_full_disk_does_not_cost_the_counted_rows(make_source, tmp_path, monkeypatch, caplog):
    make_source("parquet")
    monkeypatch.setattr("tempfile.NamedTemporaryFile", fail_with(DISK_FULL))
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        source = open_images(tmp_path / "parquet", cache_dir=tmp_path / "full")
    assert source.num_rows == 61
    assert "could not be kept" in caplog.text and "free some space on that disk" in caplog.text
    assert "`cache_dir`" in caplog.text


def test_a_disk_that_runs_full_while_counts_are_written_leaves_no_file(make_source, tmp_path, monkeypatch):
    make_source("parquet")
    monkeypatch.setattr("json.dump", fail_with(DISK_FULL))
    open_images(tmp_path / "parquet", cache_dir=tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "connection lost"), HTTP_ERROR])
def test_a_lost_connection_stops_the_stream_and_replaces_nothing(make_source, monkeypatch, error):
    source = make_source()
    monkeypatch.setattr(source, "read_chunk", fail_with(error))
    images = StreamingImages(source, resolution=8, batch_size=2, seed=0)
    for loader in (images, HeldOutImages(source, resolution=8, batch_size=2)):
        with pytest.raises(
            OSError, match="Reading the given Dataset failed.*none is replaced.*last checkpoint"
        ) as raised:
            next(iter(loader))
        assert raised.value.errno == getattr(error, "errno", None)


def test_an_image_file_that_cannot_be_read_now_is_not_replaced(make_source, monkeypatch):
    source = make_source("imagefolder")
    monkeypatch.setattr("fsspec.open", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(OSError, match="PermissionError.*not the fault of an image"):
        next(iter(StreamingImages(source, resolution=8, batch_size=2, seed=0)))
