"""The card of cached latents says what is in them and is valid on the Hub."""

from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from maetok_hf.training.latent_card import write_latents_card
from maetok_hf.training.model_card import public_name


TEMPLATE = Path(__file__).resolve().parents[2] / "model_cards" / "latents_template.md"
METADATA = {
    "tokenizer": {"class": "AutoencoderKL", "name_or_path": "user/vae", "revision": "abc", "digest": "d1e2"},
    "dataset": {"name": "ILSVRC/imagenet-1k", "config_name": None, "revision": None},
    "split": "validation",
    "resolution": 512,
    "mixed_precision": "no",
    "grid": [64, 48],
    "statistics": {"scalar": {"latents_mean": 0.25, "latents_std": 1.5}},
    "rounding": 0.00031,
    "counts": {"corrupt": 2, "grayscale": 7, "huge": 0},
    "num_images": 50_000,
    "num_rows": 49_998,
    "num_left_out": 2,
    "num_unlabeled": 0,
    "num_tokens": 3072,
    "num_channels": 4,
    "num_views": 2,
    "dtype": "float16",
}


def make_card(folder, **changes):
    path = write_latents_card(folder, TEMPLATE, repo_id="user/latents", metadata=METADATA | changes)
    return DatasetCard.load(path)


def test_metadata_lets_datasets_find_the_files(tmp_path):
    card = make_card(tmp_path)
    files = [{"split": "validation", "path": "data/validation-*.parquet"}]
    assert card.data.configs == [{"config_name": "default", "data_files": files}]
    assert card.data.size_categories == ["10K<n<100K"] and card.data.source_datasets == ["ILSVRC/imagenet-1k"]
    assert "latents" in card.data.tags
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_card_names_contents_and_origin(tmp_path):
    text = make_card(tmp_path).text
    for expected in (
        "49998, one for each of 50000 images but 2",
        "(https://huggingface.co/user/vae) (`AutoencoderKL`)",
        "(https://huggingface.co/datasets/ILSVRC/imagenet-1k)",
        "abc; digest of the encoder `d1e2`",
        "3072 tokens of 4 channels: a grid of 64 rows and 48 columns",
        "float16; the rounding is 0.00031 standard deviations",
        "| mean | 0.25 |",
        "| standard deviation | 1.5 |",
        "| computed in | float32 |",
        "2 corrupt, 7 grayscale",
        "`latent_mirrored`",
        'open_latents("user/latents")',
    ):
        assert expected in text
    assert "huge" not in text and "None" not in text and "{{" not in text


def test_card_of_one_view_in_float32_claims_no_more(tmp_path):
    text = make_card(tmp_path, num_views=1, dtype="float32", grid=None, counts={}).text
    assert "mirrored" not in text and "rounding" not in text and "grid" not in text and "random_flip=False" in text


def test_card_says_whose_features_are_there(tmp_path):
    alignment = {"model": "facebook/dinov2-base", "revision": "cafe", "digest": "f00d", "dtype": "bfloat16"}
    alignment |= {"patches_per_token": 2, "num_bytes": 503_709_245_440}
    text = make_card(tmp_path, alignment=alignment).text
    for expected in (
        "[facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base), revision cafe, digest `f00d`",
        "computed in bfloat16; for each token the mean of the unit vectors of its 2 patches",
        "float16, 504 GB |\n| mean |",
        "`features` and `features_mirrored`",
    ):
        assert expected in text
    local = make_card(tmp_path, alignment=alignment | {"model": "dinov2", "revision": None}, num_views=1).text
    assert "of `dinov2`, revision not pinned" in local and "mirrored" not in local
    assert "features" not in make_card(tmp_path).text


def test_local_folders_are_named_without_their_path(tmp_path):
    assert public_name(str(tmp_path / "pictures")) == "pictures" and public_name("user/vae") == "user/vae"
    dataset = {"name": "pictures", "config_name": None, "revision": None}
    card = make_card(tmp_path, dataset=dataset)
    assert "a local data set, `pictures`" in card.text and card.data.source_datasets is None


@pytest.mark.parametrize(("num_rows", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (2 * 10**9, "n>1B")])
def test_size_category_is_one_of_the_hub(tmp_path, num_rows, category):
    assert make_card(tmp_path, num_rows=num_rows).data.size_categories == [category]
