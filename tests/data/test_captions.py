import itertools

import pytest
import torch
from datasets import Features, Image, List, Value

from maetok_hf.data import (
    COUNT_NAMES,
    HeldOutImages,
    ImageColumns,
    StreamingImages,
    describe_counts,
    find_columns,
    open_images,
)


NUM_ROWS = 24
MISSING = {6, 11}
COLUMN = {"webdataset": "txt"}


def captions():
    return [None if index in MISSING else f"a picture of {index}, größer" for index in range(NUM_ROWS)]


@pytest.fixture
def captioned(tmp_path, toy):
    def make(kind, **settings):
        images = [toy.png(index) for index in range(NUM_ROWS)]
        data = toy.build(kind, tmp_path / kind, images, toy.labels(NUM_ROWS), captions())
        return open_images(data, **{"chunk_size": 4, "cache_dir": tmp_path / "counts", **settings})

    return make


def test_captions_come_with_their_images_from_every_format(captioned, kind, toy):
    source = captioned(kind, caption_column=COLUMN.get(kind, "caption"))
    batches = list(HeldOutImages(source, resolution=9, batch_size=7))
    assert sum((batch["captions"] for batch in batches), []) == captions()
    assert torch.cat([batch["class_labels"] for batch in batches]).tolist() == toy.labels(NUM_ROWS)
    for index, image in enumerate(torch.cat([batch["images"] for batch in batches])):
        assert torch.equal(image, torch.from_numpy(toy.pixels(index)[:, 1:10].copy()).permute(2, 0, 1))
    counts = sum(batch["counts"] for batch in batches)
    assert counts[COUNT_NAMES.index("uncaptioned")] == len(MISSING)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_captions_belong_to_their_samples(captioned, kind, num_workers):
    images = StreamingImages(
        captioned(kind, caption_column=COLUMN.get(kind, "caption")),
        resolution=8,
        batch_size=4,
        seed=0,
        num_workers=num_workers,
    )
    seen = torch.zeros(len(COUNT_NAMES), dtype=torch.int64)
    for batch in itertools.islice(images.dataloader(), 6):
        assert batch["captions"] == [captions()[index] for index in batch["indices"]]
        seen += batch["counts"]
    assert describe_counts(seen) == f"{len(MISSING)} uncaptioned"


def test_captions_are_read_only_if_they_are_asked_for(captioned, kind):
    source = captioned(kind)
    assert not {"caption", "txt", "json"} & set(source.columns.names)
    assert {row.caption for row in source.read_chunk(0)} == {None}
    batch = next(iter(HeldOutImages(source, resolution=8, batch_size=4)))
    assert "captions" not in batch and not batch["counts"].any()


def test_a_caption_may_be_a_field_of_a_json_member(captioned):
    source = captioned("webdataset", caption_column="json.caption")
    assert (source.columns.caption, source.columns.caption_fields) == ("json", ("caption",))
    assert HeldOutImages(source, resolution=8, batch_size=8).stacked()["captions"] == captions()


def test_a_caption_may_be_a_field_of_a_struct(toy):
    rows = toy.in_memory([toy.png(0), toy.png(1)], [0, 1]).add_column("meta", [{"text": "one"}, {"text": None}])
    source = open_images(rows, caption_column="meta.text")
    assert HeldOutImages(source, resolution=8, batch_size=2).stacked()["captions"] == ["one", None]


@pytest.mark.parametrize(
    ("value", "text"),
    [("a cat ", "a cat "), ("größer".encode(), "größer"), (b"\xff", "�")]
    + [(value, None) for value in (None, "", " \n", 3, ["a"], {"text": "a"})],
)
def test_caption_text(value, text):
    assert ImageColumns("image", caption="caption").caption_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [({"a": {"b": "x"}}, "x"), (b'{"a": {"b": "x"}}', "x")]
    + [(value, None) for value in (None, {"a": None}, {"a": "b"}, b"{", b"\xff", b"[1]", {"b": "x"})],
)
def test_caption_text_in_fields(value, text):
    assert ImageColumns("image", caption="json", caption_fields=("a", "b")).caption_text(value) == text


def test_a_column_that_holds_no_text_is_refused():
    features = Features(
        {"image": Image(), "size": Value("int32"), "texts": List(Value("string")), "meta": {"text": Value("string")}}
    )
    for name in ("size", "texts", "meta", "image"):
        with pytest.raises(ValueError, match=f"`caption_column='{name}'` holds no text.*Columns: 'image'"):
            find_columns(features, caption_column=name)
    for name in ("nope", "meta.nope", "size.text"):
        with pytest.raises(ValueError, match=f"`caption_column='{name}'` is not a column.*'json.caption'.*'meta'"):
            find_columns(features, caption_column=name)
    assert find_columns(features, caption_column="meta.text").names == ["image", "meta"]


def test_a_column_whose_name_has_a_dot_is_found_first():
    features = Features({"image": Image(), "a.b": Value("string"), "a": {"b": Value("string")}})
    columns = find_columns(features, caption_column="a.b", use_labels=False)
    assert (columns.caption, columns.caption_fields, columns.label) == ("a.b", (), None)
