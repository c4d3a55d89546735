import io
import logging

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.data import COUNT_NAMES, HeldOutImages, RowCounts, StreamingImages, describe_counts, open_images
from maetok_hf.data.counts import MAX_ROW_WARNINGS, RowWarnings, count_names
from maetok_hf.data.transforms import HUGE_PIXELS, size_names


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def turned() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


# What is stored, and what is counted for it at a resolution of 16. None of these is fatal.
UNUSUAL = {
    "plain": (encoded(noise(), "JPEG"), []),
    "progressive": (encoded(noise(), "JPEG", progressive=True), []),
    "cmyk": (encoded(noise("CMYK"), "JPEG"), ["cmyk"]),
    "grayscale": (encoded(noise("L"), "JPEG"), ["grayscale"]),
    "black and white": (encoded(noise("1")), ["grayscale"]),
    "palette": (encoded(noise("P")), ["palette"]),
    "transparent palette": (encoded(noise("P"), transparency=3), ["palette", "transparent"]),
    "sixteen bits": (encoded(PIL.Image.fromarray(np.full((30, 40), 40000, dtype=np.uint16))), ["sixteen_bit"]),
    "alpha": (encoded(noise("RGBA")), ["transparent"]),
    "gray and alpha": (encoded(noise("LA")), ["grayscale", "transparent"]),
    "lab": (encoded(noise("LAB"), "TIFF"), ["other_mode"]),
    "float": (encoded(noise("F"), "TIFF"), ["other_mode"]),
    "exif": (turned(), ["rotated"]),
    "one pixel": (encoded(noise(size=(1, 1))), ["enlarged"]),
    "small": (encoded(noise(size=(40, 15))), ["enlarged"]),
    "wide": (encoded(noise(size=(20000, 20))), ["elongated"]),
    "wide and flat": (encoded(noise(size=(20000, 1))), ["enlarged", "elongated"]),
    "pixels": (np.full((20, 20, 3), 9, dtype=np.uint8), []),
    "gray pixels": (np.full((20, 20), 9, dtype=np.uint8), ["grayscale"]),
    "truncated jpeg": (encoded(noise(), "JPEG")[:-200], ["corrupt"]),
    "truncated png": (encoded(noise())[:-200], ["corrupt"]),
    "truncated bmp": (encoded(noise(), "BMP")[:-200], ["corrupt"]),
    "no bytes": (b"", ["corrupt"]),
    "zero bytes": (b"\0" * 500, ["corrupt"]),
    "text": (b"<html>404</html>", ["corrupt"]),
    "nothing": (None, ["corrupt"]),
    "no pixels": (np.zeros((0, 20, 3), dtype=np.uint8), ["corrupt"]),
}


@pytest.fixture
def source_of(make_source, toy):
    """A source of the given values in its image column."""

    def make(values):
        source = make_source(images=[toy.png(0)] * len(values))
        read_chunk = source.read_chunk
        source.read_chunk = lambda chunk: [
            row._replace(image=values[int(source.chunk_starts[chunk]) + i]) for i, row in enumerate(read_chunk(chunk))
        ]
        return source

    return make


@pytest.fixture
def unusual(source_of):
    return lambda name: source_of([UNUSUAL[name][0], *[encoded(noise())] * 3])


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_image_is_handled_and_counted(unusual, name):
    names = UNUSUAL[name][1]
    images = StreamingImages(unusual(name), resolution=16, batch_size=4, seed=0)
    batch = next(iter(images))
    assert batch["images"].shape == (4, 3, 16, 16)
    assert torch.equal(batch["counts"], count_names(names))
    assert batch["replaced"].tolist() == [(index == 0 and names == ["corrupt"]) for index in batch["indices"]]


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_held_out_image_is_handled_and_counted(unusual, name):
    names = UNUSUAL[name][1]
    stacked = HeldOutImages(unusual(name), resolution=16, batch_size=4).stacked()
    assert torch.equal(stacked["counts"], count_names(names))
    assert stacked["indices"].tolist() == ([1, 2, 3] if names == ["corrupt"] else [0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_pil_finds_too_large_is_replaced(source_of, monkeypatch):
    source = source_of([encoded(noise(size=(40, 40))), *[encoded(noise(size=(40, 30)))] * 3])
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)  # it warns of more and refuses twice as many
    batch = next(iter(StreamingImages(source, resolution=16, batch_size=4, seed=0)))
    assert describe_counts(batch["counts"]) == "1 corrupt"
    assert batch["replaced"].tolist() == [index == 0 for index in batch["indices"]]


def test_huge_images_are_counted(unusual, monkeypatch):
    monkeypatch.setattr("maetok_hf.data.transforms.HUGE_PIXELS", 40 * 30 - 1)
    batch = next(iter(StreamingImages(unusual("plain"), resolution=16, batch_size=4, seed=0)))
    assert describe_counts(batch["counts"]) == "4 huge"
    assert HUGE_PIXELS > 20e6, "photographs of usual cameras are not huge"


@pytest.mark.parametrize("require_labels", [False, True])
def test_missing_labels_are_counted_whether_they_are_replaced_or_not(make_source, toy, require_labels):
    source = make_source(images=[toy.png(i) for i in range(4)], classes=[0, None, 1, 2])
    images = StreamingImages(source, resolution=8, batch_size=4, seed=0, require_labels=require_labels)
    batch = next(iter(images))
    assert describe_counts(batch["counts"]) == "1 unlabeled"
    assert batch["replaced"].sum() == require_labels
    assert (batch["class_labels"] < 0).sum() == (not require_labels)


def test_labels_that_are_not_read_are_not_missing(toy):
    dataset = toy.in_memory([toy.png(i) for i in range(4)], [None] * 4)
    batch = next(iter(StreamingImages(open_images(dataset, use_labels=False), resolution=8, batch_size=4, seed=0)))
    assert not batch["counts"].any() and "class_labels" not in batch


def test_counts_of_a_batch_that_is_left_out_whole_come_with_the_next(make_source, toy):
    source = make_source(images=[b"", b"", toy.png(2), b"", toy.png(4)])
    batches = list(HeldOutImages(source, resolution=8, batch_size=2))
    assert [batch["indices"].tolist() for batch in batches] == [[2], [4]]
    assert [describe_counts(batch["counts"]) for batch in batches] == ["3 corrupt", "nothing unusual"]


def test_counts_of_last_batches_that_are_left_out_whole_come_with_the_last_there_is(make_source, toy):
    source = make_source(images=[toy.png(0), b"", toy.png(2), toy.png(3), b"", b"", b""])
    batches = list(HeldOutImages(source, resolution=8, batch_size=2))
    assert [batch["indices"].tolist() for batch in batches] == [[0], [2, 3]]
    assert [describe_counts(batch["counts"]) for batch in batches] == ["1 corrupt", "3 corrupt"]


def test_counts_of_a_run_outlast_its_reports_and_its_stops():
    def processes(counts):
        return 2 * counts  # two that have seen the same

    counts = RowCounts(processes)
    counts.add(count_names(["cmyk", "corrupt", "cmyk"]))
    assert counts.describe() == counts.report() == "2 corrupt, 4 cmyk"
    assert counts.describe() == "nothing unusual"
    counts.add(count_names(["grayscale"]))
    resumed = RowCounts(lambda counts: counts)
    resumed.load(counts.state())
    for each in (counts, resumed):
        assert each.describe() == "2 grayscale"
        assert each.of_run() == {"corrupt": 2, "grayscale": 2, "cmyk": 4}


def test_counts_are_described_in_words():
    counts = count_names(["enlarged", "corrupt", "enlarged"])
    assert counts.dtype == torch.int64 and counts.shape == (len(COUNT_NAMES),)
    assert describe_counts(counts) == "1 corrupt, 2 enlarged"
    assert describe_counts(counts + counts) == "2 corrupt, 4 enlarged"
    assert describe_counts(count_names([])) == "nothing unusual"


@pytest.mark.parametrize(
    ("size", "names"),
    [
        ((16, 16), ()),
        ((15, 99), ("enlarged",)),
        ((16, 257), ("elongated",)),
        ((257, 16), ("elongated",)),
        ((256, 16), ()),
        ((1, 1), ("enlarged",)),
    ],
)
def test_names_of_a_size(size, names):
    assert size_names(size, 16) == names


def test_every_name_that_is_given_can_be_counted():
    assert len(set(COUNT_NAMES)) == len(COUNT_NAMES)
    assert count_names(COUNT_NAMES).tolist() == [1] * len(COUNT_NAMES)
    assert {name for _, names in UNUSUAL.values() for name in names} | {"huge", "unlabeled", "uncaptioned"} == set(
        COUNT_NAMES
    )


def test_thousands_of_bad_rows_do_not_flood_the_log(caplog):
    warn = RowWarnings(logging.getLogger("maetok_hf.data"), "the data")
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        for row in range(12345):
            warn(row, f"Row {row} is bad.")
            warn(row, "Again.")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[: MAX_ROW_WARNINGS - 1] == [f"Row {row} is bad." for row in range(MAX_ROW_WARNINGS - 1)]
    assert messages[MAX_ROW_WARNINGS - 1] == "Row 9 is bad. Further rows are counted only."
    assert [message.split()[0] for message in messages[MAX_ROW_WARNINGS:]] == ["100", "1000", "10000"]
    assert all("the data" in message for message in messages[MAX_ROW_WARNINGS:])


def test_a_stream_of_bad_rows_logs_a_few_and_counts_all(make_source, toy, caplog):
    source = make_source(images=[toy.png(0) if index == 0 else b"" for index in range(60)])
    images = StreamingImages(source, resolution=8, batch_size=4, seed=0)
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        counts = sum(batch["counts"] for _, batch in zip(range(15), images, strict=False))
    assert describe_counts(counts) == "59 corrupt"
    assert len(caplog.records) == MAX_ROW_WARNINGS


def warned_rows(caplog):
    return sorted(int(record.getMessage().split()[1]) for record in caplog.records)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_is_reported_once_whichever_loader_meets_it_how_often(make_source, toy, caplog, num_workers):
    bad = [3, 11, 12]
    source = make_source(images=[b"" if index in bad else toy.png(index) for index in range(16)])
    settings = {"resolution": 8, "batch_size": 4, "seed": 0, "num_workers": num_workers}
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        for images in (StreamingImages(source, **settings), StreamingImages(source, shuffle=False, **settings)):
            for _ in range(2):
                epochs = [batch for _, batch in zip(range(8), images.dataloader(), strict=False)]
                assert describe_counts(sum(batch["counts"] for batch in epochs)) == "6 corrupt"
                assert not any("problems" in batch for batch in epochs)
        list(HeldOutImages(source, resolution=8, batch_size=4).dataloader())
    assert warned_rows(caplog) == bad
