import gzip
import logging
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import DatasetDict, IterableDataset, load_dataset

from maetok_hf.data import CorruptImageError, open_images
from maetok_hf.data.sources import (
    DatasetSource,
    ParquetSource,
    Row,
    StreamSource,
    TarSource,
    decode_image,
)


SOURCE_OF = {
    "dataset": DatasetSource,
    "parquet": ParquetSource,
    "imagefolder": DatasetSource,
    "webdataset": TarSource,
    "stream": StreamSource,
}


@pytest.fixture
def assert_rows(toy):
    def check(rows, indices, num_rows=61):
        assert len(rows) == len(indices)
        for (image, label), index in zip(rows, indices, strict=True):
            np.testing.assert_array_equal(image, toy.pixels(index))
            assert label == toy.labels(num_rows)[index]

    return check


def read(source, chunks=None):
    rows = []
    for chunk in range(len(source.chunk_sizes)) if chunks is None else chunks:
        raw = source.read_chunk(chunk)
        assert len(raw) == source.chunk_sizes[chunk]
        rows += [(np.asarray(sample.image), sample.label) for sample in map(source.decode, raw)]
    return rows


def test_every_format_gives_the_same_rows(make_source, kind, assert_rows):
    source = make_source(kind)
    assert type(source) is SOURCE_OF[kind] and source.num_rows == len(source) == 61
    assert_rows(read(source), range(61))


def test_every_format_can_be_read_at_any_place(make_source, kind, assert_rows):
    source = make_source(kind)
    order = np.random.default_rng(0).permutation(len(source.chunk_sizes))
    indices = [int(source.chunk_starts[c]) + i for c in order for i in range(int(source.chunk_sizes[c]))]
    assert sorted(indices) == list(range(61))
    assert_rows(read(source, order), indices)


def test_a_listing_names_the_files_wherever_they_lie(make_source, kind):
    source = make_source(kind)
    listing = list(source.listing())
    if kind == "imagefolder":
        assert len(listing) == source.num_rows
        name, size, label, caption = listing[0]
        assert name.endswith(".png") and size > 0 and label == 0 and caption is None
    elif kind in ("parquet", "webdataset"):
        assert [name for (name,) in listing] == [Path(file).name for file in source.files] and listing
    else:
        assert listing == []


def test_two_readers_of_a_stream_do_not_disturb_each_other(make_source, assert_rows):
    source = make_source("stream")
    order = [c for pair in zip(range(0, 8), range(8, 16), strict=True) for c in pair]
    indices = [int(source.chunk_starts[c]) + i for c in order for i in range(int(source.chunk_sizes[c]))]
    assert_rows(read(source, order), indices)


def test_class_names_are_known_where_the_format_has_them(make_source, kind, toy):
    source = make_source(kind)
    if kind == "webdataset":
        assert source.num_classes is None and source.id2label is None
    else:
        assert source.num_classes == 3 and source.id2label == dict(enumerate(toy.CLASS_NAMES))


def test_a_source_with_open_files_can_be_sent_to_another_process(make_source, kind, assert_rows):
    source = make_source(kind)
    read(source, [0, 5])
    assert_rows(read(pickle.loads(pickle.dumps(source))), range(61))


def test_row_groups_are_joined_but_never_cut(tmp_path, toy, assert_rows):
    dataset = toy.in_memory([toy.png(index) for index in range(50)], toy.labels(50))
    for rows, size in enumerate((3, 20)):
        folder = tmp_path / str(rows)
        folder.mkdir()
        toy.write_parquet(folder / "train.parquet", dataset, row_group_size=size)
        source = open_images(folder, chunk_size=8, cache_dir=tmp_path)
        assert source.chunk_sizes.tolist() == ([9] * 5 + [5] if size == 3 else [20, 20, 10])
        assert_rows(read(source), range(50), num_rows=50)


def test_only_the_needed_columns_of_a_parquet_file_are_read(tmp_path, toy):
    dataset = toy.in_memory([toy.png(index) for index in range(10)], toy.labels(10)).add_column("text", ["x"] * 10)
    toy.write_parquet(tmp_path / "train.parquet", dataset, row_group_size=5)
    source = open_images(tmp_path, use_labels=False, cache_dir=tmp_path / "counts")
    assert [row.label for row in source.read_chunk(0)] == [None] * 10
    assert source.columns.names == ["image"]


@pytest.mark.parametrize(("kind", "counter"), [("parquet", ParquetSource), ("webdataset", TarSource)])
def test_rows_are_counted_once_per_version_of_the_files(make_source, monkeypatch, kind, counter, tmp_path):
    counted = []
    count = counter.count
    monkeypatch.setattr(
        counter, "count", staticmethod(lambda file, *arguments: (counted.append(file), count(file, *arguments))[1])
    )
    assert make_source(kind).num_rows == 61 and len(counted) == 3
    assert open_images(tmp_path / kind, chunk_size=4, cache_dir=tmp_path / "counts").num_rows == 61
    assert len(counted) == 3
    for cached in (tmp_path / "counts").iterdir():
        assert cached.suffix == ".json"
        cached.write_text("[1, 2")  # as an interrupted copy leaves it
    assert open_images(tmp_path / kind, chunk_size=4, cache_dir=tmp_path / "counts").num_rows == 61
    assert len(counted) == 6
    assert make_source(kind, 40).num_rows == 40, "files that have changed must be counted again"


def test_counts_that_cannot_be_kept_are_reported_and_not_fatal(make_source, tmp_path, caplog):
    (tmp_path / "counts").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        assert make_source("parquet").num_rows == 61
    assert "could not be kept" in caplog.text


def test_counts_go_to_the_cache_of_datasets_by_default(make_source, tmp_path, monkeypatch):
    make_source("parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    open_images(tmp_path / "parquet")
    assert len(list((tmp_path / "hf" / "maetok_hf").glob("parquet-*.json"))) == 1


def test_tar_samples_may_have_folders_long_names_and_missing_members(tmp_path, toy):
    names = ["train/a.b/0", f"train/{'n' * 150}", *(f"train/{index}" for index in range(2, 6))]
    members = [(".hidden.png", b"?"), ("README", b"?")]  # neither belongs to a sample
    for index, name in enumerate(names):
        members += [(f"{name}.cls", b"%d" % index), (f"{name}.png", toy.png(index))]
    members += [("train/6.cls", b"6"), ("train/7.png", toy.png(7))]
    toy.write_tar(tmp_path / "train.tar", members)
    data_files = {"train": str(tmp_path / "train.tar")}
    source = open_images("webdataset", data_files=data_files, chunk_size=3, cache_dir=tmp_path / "counts")
    assert source.chunk_sizes.tolist() == [3, 3, 2]
    expected = [Row(toy.png(index), b"%d" % index) for index in range(6)] + [Row(None, b"6"), Row(toy.png(7))]
    for chunk in (2, 0, 1):
        assert source.read_chunk(chunk) == expected[3 * chunk : 3 * chunk + 3]


def test_a_cut_off_tar_file_is_reported(make_source, tmp_path):
    make_source("webdataset")
    path = tmp_path / "webdataset" / "train-002.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train-002\.tar.*no complete tar file"):
        open_images(tmp_path / "webdataset", chunk_size=4, cache_dir=tmp_path / "counts")


def test_a_compressed_tar_file_is_read_as_a_stream(tmp_path, toy):
    toy.write_tar(
        tmp_path / "all.tar", [(f"{i:03d}.{e}", d) for i in range(9) for e, d in (("png", toy.png(i)), ("cls", b"1"))]
    )
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress((tmp_path / "all.tar").read_bytes()))
    source = open_images(
        "webdataset", data_files=str(tmp_path / "all.tar.gz"), chunk_size=4, cache_dir=tmp_path / "counts"
    )
    assert isinstance(source, StreamSource) and source.num_rows == 9
    for index, (image, label) in enumerate(read(source, [0, 1, 2])):
        np.testing.assert_array_equal(image, toy.pixels(index))
        assert label == 1


def test_a_folder_of_images_is_read_by_split(tmp_path, toy):
    for split, indices in (("train", (0, 1)), ("validation", (2,))):
        for index in indices:
            path = tmp_path / split / "cat" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(toy.png(index))
    source = open_images(tmp_path, split="validation")
    assert len(source) == 1 and source.columns.label is None
    np.testing.assert_array_equal(read(source)[0][0], toy.pixels(2))
    assert len(open_images(tmp_path)) == 2
    assert len(open_images("imagefolder", data_dir=str(tmp_path / "train"))) == 2


def test_a_stream_of_bare_images_without_features(tmp_path, toy, assert_rows):
    def rows():
        for index in range(7):
            yield {"image": PIL.Image.fromarray(toy.pixels(index)), "label": toy.labels(7)[index]}

    source = open_images(IterableDataset.from_generator(rows), chunk_size=3)
    assert isinstance(source, StreamSource) and source.num_classes is None
    assert_rows(read(source, [0, 2, 1]), [0, 1, 2, 6, 3, 4, 5], num_rows=7)


def test_a_loaded_stream_and_its_name_give_the_same_rows(make_source, tmp_path, assert_rows):
    make_source("parquet")
    stream = load_dataset(str(tmp_path / "parquet"), split="train", streaming=True)
    assert_rows(read(open_images(stream, chunk_size=4)), range(61))


def test_a_format_changes_nothing_and_a_transform_is_refused(toy):
    dataset = toy.in_memory([toy.png(0), toy.png(1)], [0, 1])
    assert len(read(open_images(dataset.with_format("torch")))) == 2
    with pytest.raises(ValueError, match="set_transform"):
        open_images(dataset.with_transform(lambda rows: rows))


def test_a_stream_that_becomes_shorter_is_an_error(toy):
    lengths = [10]

    def rows():
        for index in range(lengths[0]):
            yield {"image": toy.png(index)}

    source = open_images(IterableDataset.from_generator(rows), chunk_size=4, image_column="image")
    lengths[0] = 5
    with pytest.raises(ValueError, match="has become shorter"):
        read(source)


@pytest.mark.parametrize(
    "value",
    [None, b"", b"no image", {"bytes": None, "path": None}, {"bytes": b"no image", "path": "a.png"}, "nowhere/a.png"],
)
def test_what_is_no_image_is_a_corrupt_image(value):
    with pytest.raises(CorruptImageError):
        decode_image(value)


def test_half_an_image_is_a_corrupt_image(toy):
    with pytest.raises(CorruptImageError, match="truncated"):
        decode_image(toy.png(0)[:200])


def test_an_image_can_be_stored_in_any_way(tmp_path, toy):
    (tmp_path / "a.png").write_bytes(toy.png(3))
    path = str(tmp_path / "a.png")
    for value in (toy.png(3), {"bytes": toy.png(3), "path": None}, {"bytes": None, "path": path}, path, toy.pixels(3)):
        np.testing.assert_array_equal(np.asarray(decode_image(value)[0]), toy.pixels(3))


def test_a_lost_connection_is_no_corrupt_image(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr("fsspec.open", fail)
    with pytest.raises(ConnectionResetError):
        decode_image("https://nowhere.invalid/a.png")


@pytest.mark.parametrize("name", ["./nope", "../nope", "/no/such", "~/nope", "a/b/c", "nope/", "my images/train"])
def test_a_name_that_can_only_be_a_folder_is_not_sought_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset_builder", None)
    with pytest.raises(FileNotFoundError, match=r"no folder /.*check the path.*`data_files`"):
        open_images(name)
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "nope", tmp_path / "file", Path("nope")):
        with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}"):
            open_images(path)


def test_the_home_folder_can_be_written_short(make_source, tmp_path, monkeypatch):
    make_source("parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/parquet", cache_dir=tmp_path / "counts")) == 61


def test_a_missing_folder_or_data_set_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty.*images, parquet or tar"):
        open_images(tmp_path / "empty")

    def gated(*arguments, **options):
        from datasets.exceptions import DatasetNotFoundError

        raise DatasetNotFoundError("Dataset 'someone/images' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset_builder", gated)
    with pytest.raises(OSError, match=r"(?s)gated.*huggingface.co/datasets/someone/images.*hf auth login.*HF_TOKEN"):
        open_images("someone/images")


def test_a_missing_split_is_named_with_the_splits_there_are(tmp_path, toy):
    dataset = toy.in_memory([toy.png(0), toy.png(1)], [0, 1])
    for split in ("test", "validation"):
        toy.write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", dataset, row_group_size=5)
    with pytest.raises(ValueError, match="no split 'train'.*'validation'"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="`split='dev'`.*'test'"):
        open_images(tmp_path, split="dev")
    with pytest.raises(ValueError, match=r"cannot be cut.*split or folder of their own"):
        open_images(tmp_path, split="test[:90%]")


def test_arguments_that_do_not_fit_the_data_are_refused(toy):
    dataset = toy.in_memory([toy.png(0)], [0])
    with pytest.raises(ValueError, match="`split`, `revision`.*already loaded"):
        open_images(dataset, split="train", revision="main")
    with pytest.raises(ValueError, match="dictionary of splits.*'train'"):
        open_images(DatasetDict({"train": dataset}))
    with pytest.raises(ValueError, match="`data` must be.*int"):
        open_images(3)
    with pytest.raises(ValueError, match="`chunk_size`.*0"):
        open_images(dataset, chunk_size=0)


def test_an_empty_data_set_is_refused(toy):
    dataset = toy.in_memory([toy.png(0)], [0])
    with pytest.raises(ValueError, match="has no rows"):
        open_images(dataset.select([]))
    with pytest.raises(ValueError, match="has no rows"):
        open_images(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match="has no rows"):
        open_images(dataset.to_iterable_dataset().filter(lambda row: False, input_columns=["label"]))
