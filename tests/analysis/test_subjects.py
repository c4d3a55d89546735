"""Tokenizers and caches by their address, and the latents of chosen rows."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from maetok_hf.analysis import subjects
from maetok_hf.analysis.subjects import Address, open_subjects
from maetok_hf.data import HeldOutImages, open_images, to_pixel_values
from maetok_hf.training.latent_encoding import encode_tokens, load_tokenizer


@pytest.mark.parametrize(
    ("word", "address"),
    [
        ("user/name", Address("user/name")),
        ("user/name@main", Address("user/name", revision="main")),
        ("user/name/vae", Address("user/name", subfolder="vae")),
        ("user/name@v1/a/vae", Address("user/name", subfolder="a/vae", revision="v1")),
        ("datasets/user/name@v1", Address("user/name", revision="v1", is_cache=True)),
    ],
)
def test_addresses_on_the_hub(word, address):
    assert Address.of(word) == address


def test_folders_are_told_apart_by_their_files(tmp_path):
    for name in ("generator/vae", "latents", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "generator" / "model_index.json").write_text("{}")
    (tmp_path / "generator" / "vae" / "config.json").write_text("{}")
    (tmp_path / "latents" / "settings.json").write_text("{}")
    pipeline = Address.of(str(tmp_path / "generator"))
    assert (pipeline.subfolder, pipeline.name, pipeline.is_cache) == ("vae", "generator", False)
    tokenizer = Address.of(str(tmp_path / "generator" / "vae"))
    assert (tokenizer.subfolder, tokenizer.name) == (None, "generator")
    assert Address.of(str(tmp_path / "latents")).is_cache
    with pytest.raises(ValueError, match="folder without config.json"):
        Address.of(str(tmp_path / "empty"))
    for word in ("nothing", "./user/name", "datasets/user/name/vae"):
        with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
            Address.of(word)


def test_tokenizers_of_one_name_must_be_told_apart(make_options, tokenizer_folders, tmp_path):
    (tmp_path / "wide").symlink_to(tokenizer_folders[1])
    (tmp_path / "copy").mkdir()
    twice = {"tokenizer": [str(tokenizer_folders[0]), f"{tokenizer_folders[0]}/."]}
    with pytest.raises(ValueError, match="tell them apart by `names`"):
        open_subjects(make_options(**twice), "cpu")
    assert list(open_subjects(make_options(**twice, names=["a", "b"]), "cpu")) == ["a", "b"]


@pytest.mark.parametrize("block_rows", [5, 7, 1024])
def test_latents_are_those_of_the_chosen_rows(make_options, tokenizer_folders, monkeypatch, block_rows):
    monkeypatch.setattr(subjects, "BLOCK_ROWS", block_rows)
    options = make_options(num_train_images=17, batch_size=5)
    subject = open_subjects(options, "cpu")["wide"]
    blocks = list(subject.blocks("train", 0))
    indices = torch.cat([block.indices for block in blocks])
    assert indices.tolist() == subject.rows["train"].tolist()
    source = open_images(options.dataset, split="train", cache_dir=options.cache_dir)
    images = HeldOutImages(source, resolution=16, batch_size=64).stacked()
    pixels = to_pixel_values(images["images"][indices])
    expected = encode_tokens(load_tokenizer(str(tokenizer_folders[0])), pixels)
    torch.testing.assert_close(torch.cat([block.latents for block in blocks]), expected)
    assert torch.equal(torch.cat([block.labels for block in blocks]), images["class_labels"][indices])
    # what begins later goes on with the same batches, and so with the same bits
    rest = list(subject.blocks("train", 2))
    assert [block.number for block in rest] == [block.number for block in blocks[2:]]
    for one, other in zip(rest, blocks[2:], strict=True):
        assert torch.equal(one.latents, other.latents)


def test_data_workers_give_the_same_latents(make_options):
    blocks = []
    for workers in (0, 2):
        subject = open_subjects(make_options(dataloader_num_workers=workers, num_train_images=20), "cpu")["wide"]
        blocks.append(next(subject.blocks("train", 0)))
    assert torch.equal(blocks[0].latents, blocks[1].latents)
    assert torch.equal(blocks[0].indices, blocks[1].indices)


def test_any_autoencoder_of_diffusers_is_a_subject(make_options, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3, "sample_size": 16}
        AutoencoderKL(**blocks, **sizes).save_pretrained(tmp_path / "kl")
    subject = open_subjects(make_options(tokenizer=[str(tmp_path / "kl")]), "cpu")["kl"]
    assert subject.class_name == "AutoencoderKL" and subject.shape == (64, 3)
    block = next(subject.blocks("held_out", 0))
    assert block.latents.shape == (18, 64, 3) and np.isfinite(block.latents.numpy()).all()


def test_latents_too_large_for_the_file_are_refused(make_options, monkeypatch):
    def huge(tokenizer, images):
        return torch.full((len(images), 6, 4), 1e6)

    monkeypatch.setattr("maetok_hf.training.latent_encoding.encode_tokens", huge)
    subject = open_subjects(make_options(latents_dtype="float16"), "cpu")["wide"]
    with pytest.raises(ValueError, match="use float32"):
        next(subject.blocks("train", 0))
