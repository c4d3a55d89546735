import pytest
from datasets import ClassLabel, Features, Image, Value

from maetok_hf.data import ImageColumns, find_columns


NAMES = ["cat", "dog"]


def test_columns_are_found_by_their_features():
    features = Features({"id": Value("string"), "picture": Image(), "species": ClassLabel(names=NAMES)})
    columns = find_columns(features)
    assert (columns.image, columns.label, columns.class_names) == ("picture", "species", ("cat", "dog"))
    assert columns.num_classes == 2 and columns.id2label == {0: "cat", 1: "dog"}


def test_columns_are_found_by_usual_names():
    features = {"jpg": Value("binary"), "cls": Value("int64"), "__key__": Value("string")}
    columns = find_columns(features)
    assert (columns.image, columns.label, columns.num_classes, columns.id2label) == ("jpg", "cls", None, None)


def test_a_bytes_and_path_struct_is_an_image_column():
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    assert find_columns(features) == ImageColumns("image")


def test_a_data_set_without_labels_is_fine():
    assert find_columns(Features({"image": Image(), "caption": Value("string")})).label is None


def test_labels_can_be_left_out():
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    assert find_columns(features, use_labels=False) == ImageColumns("image")
    with pytest.raises(ValueError, match="`label_column='label'`.*`use_labels`"):
        find_columns(features, label_column="label", use_labels=False)


def test_given_columns_settle_what_is_ambiguous():
    features = Features(
        {"a": Image(), "b": Image(), "coarse": ClassLabel(names=NAMES), "fine": ClassLabel(names=NAMES)}
    )
    with pytest.raises(ValueError, match="image column is ambiguous: 'a', 'b'.*`image_column`.*'coarse'"):
        find_columns(features)
    with pytest.raises(ValueError, match="label column is ambiguous: 'coarse', 'fine'.*`label_column`.*Columns: 'a'"):
        find_columns(features, image_column="a")
    columns = find_columns(features, image_column="b", label_column="fine")
    assert (columns.image, columns.label) == ("b", "fine")


@pytest.mark.parametrize("argument", ["image_column", "label_column"])
def test_an_unknown_column_is_named_with_the_known_ones(argument):
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    with pytest.raises(ValueError, match=f"`{argument}='nope'`.*'image'.*'label'"):
        find_columns(features, **{argument: "nope"})


def test_columns_of_the_wrong_kind_are_refused():
    features = Features({"image": Image(), "size": Value("int32"), "text": Value("string")})
    with pytest.raises(ValueError, match="`image_column='size'` holds no images.*'text'"):
        find_columns(features, image_column="size")
    with pytest.raises(ValueError, match="`label_column='text'`.*class_encode_column"):
        find_columns(features, label_column="text")
    with pytest.raises(ValueError, match="no image column.*'size'"):
        find_columns(Features({"size": Value("int32")}))


@pytest.mark.parametrize(
    ("value", "index"),
    [(1, 1), ("dog", 1), ("1", 1), (b"1\n", 1), (True, 1), (0.0, 0)]
    + [(value, -1) for value in (None, -1, 2, "wolf", "", 0.5, float("nan"), float("inf"), [1])],
)
def test_label_index(value, index):
    assert ImageColumns("image", "label", ("cat", "dog")).label_index(value) == index
    assert ImageColumns("image", "label").label_index(7) == 7
