"""Cached latents: every usable image once, in the same files whatever was stopped and by how many processes."""

import hashlib
import itertools
import json
import signal
import sys

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL

from maetok_hf.data import HeldOutImages, ImageRanges, StreamingLatents, open_images, open_latents, to_pixel_values
from maetok_hf.training import hub as hub_module
from maetok_hf.training.latent_encoding import ViewEncoder, check_same_encoder, encode_tokens, load_tokenizer
from tests.loopback_hub import check_card
from tests.testing_utils import signal_before, start_and_kill, tiny_autoencoder


NUM_IMAGES, CORRUPT = 41, 7  # of the data set in conftest.py


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_autoencoder(sample_size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(data_folder, tokenizer_folder, tmp_path):
    flags = ["--dataset_name", data_folder, "--tokenizer_name_or_path", tokenizer_folder, "--resolution", 16]
    return [*flags, "--rows_per_shard", 8, "--batch_size", 3, "--cache_dir", tmp_path / "cache"]


def files_in(folder):
    """Digests of everything that a cache consists of."""
    paths = [*folder.glob("data/*"), *(folder / name for name in ("settings.json", "latents.json"))]
    return {str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() for path in paths}


def finished(folder):
    return sorted(folder.glob("data/train-*.parquet"))


def stop_at(module, monkeypatch, call, number):
    """Send this process a signal in the given call of the encoder."""
    monkeypatch.setattr(module.ViewEncoder, "__call__", signal_before(module.ViewEncoder.__call__, call, number))


def test_every_usable_image_is_there_once_with_the_latents_of_both_views(
    run_here, flags, data_folder, tokenizer_folder, tmp_path, capsys
):
    run_here("cache_latents", *flags, "--dtype", "float32", "--output_dir", tmp_path / "out")
    assert f"{NUM_IMAGES - 1} of {NUM_IMAGES} images (1 corrupt" in capsys.readouterr().out
    rows = list(datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True))
    assert [row["index"] for row in rows] == [index for index in range(NUM_IMAGES) if index != CORRUPT]

    source = open_images(str(data_folder), split="train", cache_dir=tmp_path / "cache")
    images = HeldOutImages(source, resolution=16, batch_size=8).stacked()
    assert [row["label"] for row in rows] == images["class_labels"].tolist()
    tokenizer, pixels = load_tokenizer(str(tokenizer_folder)), to_pixel_values(images["images"])
    for column, view in (("latent", pixels), ("latent_mirrored", pixels.flip(-1))):
        expected = encode_tokens(tokenizer, view).flatten(1)
        torch.testing.assert_close(torch.tensor([row[column] for row in rows]), expected)


def test_metadata_and_card_say_what_is_there(run_here, flags, tokenizer_folder, tmp_path):
    folder = tmp_path / "out"
    run_here("cache_latents", *flags, "--output_dir", folder)
    metadata = json.loads((folder / "latents.json").read_text())
    table = pq.read_table([str(path) for path in finished(folder)])
    stored = np.stack(
        [table.column(name).combine_chunks().flatten().to_numpy() for name in ("latent", "latent_mirrored")]
    ).astype("float64")
    scalar, channel = metadata["statistics"]["scalar"], metadata["statistics"]["channel"]
    assert scalar["latents_mean"] == pytest.approx(stored.mean()) and scalar["latents_std"] == pytest.approx(
        stored.std()
    )
    assert channel["latents_mean"] == pytest.approx(stored.reshape(-1, 4).mean(0).tolist())
    assert channel["latents_std"] == pytest.approx(stored.reshape(-1, 4).std(0).tolist())
    assert 1e-5 < metadata["rounding"] < 1 / 2048
    counted = ("num_images", "num_rows", "num_left_out", "num_unlabeled", "num_tokens", "num_channels", "num_views")
    assert [metadata[name] for name in counted] == [41, 40, 1, 0, 6, 4, 2]
    assert metadata["counts"]["corrupt"] == 1 and metadata["grid"] is None
    assert metadata["class_names"] == ["one", "two", "three"]
    assert metadata["tokenizer"]["name_or_path"] == tokenizer_folder.name, "no path of this machine"
    check_same_encoder(load_tokenizer(str(tokenizer_folder)), metadata)
    card = (folder / "README.md").read_text()
    assert "40, one for each of 41 images but 1" in card and str(tmp_path) not in card
    assert f"| standard deviation | {scalar['latents_std']:.6g} |" in card


def test_latents_come_back_normalised_for_training(run_here, flags, tmp_path):
    run_here("cache_latents", *flags, "--output_dir", tmp_path / "out")
    latents = StreamingLatents(open_latents(tmp_path / "out"), batch_size=5, seed=0)
    batches = latents.dataloader()
    epoch = [batch for batch, _ in zip(batches, range(latents.micro_batches_per_epoch), strict=False)]
    values = torch.cat([batch["latents"] for batch in epoch])
    assert values.shape == (40, 6, 4) and abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1
    for batch in epoch:
        assert torch.equal(batch["class_labels"], batch["indices"] % 3)


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_tokenizer_on_the_hub_is_named_by_its_commit(revision, run_here, flags, tokenizer_folder, tmp_path, hub):
    repository = hub.add("user/tokenizer")
    repository.commit("weights", {f"vae/{path.name}": path.read_bytes() for path in tokenizer_folder.iterdir()})
    commit, folder = repository.sha, tmp_path / "out"
    given = ["--tokenizer_name_or_path", "user/tokenizer", "--tokenizer_subfolder", "vae", "--output_dir", folder]
    given += [] if revision is None else ["--tokenizer_revision", revision]
    run_here("cache_latents", *flags, *given)
    known = open_latents(folder).metadata["tokenizer"]
    assert (known["name_or_path"], known["revision"]) == ("user/tokenizer", commit)
    assert f"| tokenizer revision | {commit};" in (folder / "README.md").read_text()


def test_pushed_latents_are_read_by_their_name(run_here, flags, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setattr(hub_module, "RETRY_WAITS", ())
    command = ["cache_latents", *flags, "--output_dir", tmp_path / "out", "--push_to_hub", "latents"]
    hub.quota = 1000
    with pytest.raises(OSError, match="is not uploaded to user/latents, and is as it was: .*storage limit"):
        run_here(*command, "--hub_private_repo", "true")
    before, hub.quota = files_in(tmp_path / "out"), None
    assert open_latents(tmp_path / "out").num_rows == NUM_IMAGES - 1

    monkeypatch.setattr(ViewEncoder, "__call__", None)  # nothing is encoded again
    run_here(*command)
    assert "The latents are on the Hub: user/latents" in capsys.readouterr().out
    repository = hub.repositories["datasets/user/latents"]
    assert repository.private and repository.messages == [f"Latents of {NUM_IMAGES} images"]
    assert repository.files.keys() == {"README.md", "latents.json", *(name for name in before if ".parquet" in name)}
    assert files_in(tmp_path / "out") == before
    card = check_card("user/latents", "dataset")
    assert 'open_latents("user/latents")' in card.text and str(tmp_path) not in str(card)
    rows = list(datasets.load_dataset("user/latents", split="train", streaming=True))
    local = {"batch_size": 8, "seed": 0}
    here, there = (StreamingLatents(open_latents(place), **local) for place in (tmp_path / "out", "user/latents"))
    assert len(rows) == len(here.source) == len(there.source)
    for one, other in zip(itertools.islice(here, 6), itertools.islice(there, 6), strict=True):
        assert torch.equal(one["latents"], other["latents"]) and torch.equal(one["indices"], other["indices"])


def test_a_hub_that_refuses_ends_the_command_before_any_work(run_here, flags, tmp_path, hub):
    with pytest.raises(ValueError, match="`push_to_hub` = 'somebody/latents': .*403"):
        run_here("cache_latents", *flags, "--output_dir", tmp_path / "out", "--push_to_hub", "somebody/latents")
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_changed_folder_of_images_does_not_continue_a_cache(run_here, tokenizer_folder, tmp_path):
    folder = tmp_path / "images" / "train"
    for index in range(40):
        (folder / f"{index // 20}").mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index // 20}" / f"{index}.png")
    flags = ["--dataset_name", tmp_path / "images", "--tokenizer_name_or_path", tokenizer_folder, "--resolution", 16]
    command = ["cache_latents", *flags, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    run_here(*command)
    (folder / "0" / "19.png").rename(folder / "1" / "40.png")
    with pytest.raises(ValueError, match="other settings:\n  data.digest: "):
        run_here(*command)


@pytest.mark.parametrize("more", [["--dataloader_num_workers", 2], []], ids=["workers", "again"])
def test_files_are_the_same_with_data_workers_and_in_a_second_run(run_here, flags, tmp_path, more):
    for name, words in (("one", []), ("two", more)):
        run_here("cache_latents", *flags, *words, "--output_dir", tmp_path / name)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_loses_the_file_it_was_writing_and_continues(run_here, flags, tmp_path, monkeypatch, number):
    run_here("cache_latents", *flags, "--output_dir", tmp_path / "whole")
    command = ["cache_latents", *flags, "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit) as caught, monkeypatch.context() as patch:
        run_here(*command, prepare=lambda module: stop_at(module, patch, 8, number))
    assert caught.value.code == 128 + number
    assert len(list((tmp_path / "stopped" / "data").iterdir())) == 2, "two whole files and no other"
    with pytest.raises(ValueError, match="has no file latents.json"):
        open_latents(tmp_path / "stopped")

    ranges = []

    def record(module):
        class Recorder(ImageRanges):
            def __init__(self, *arguments, **settings):
                ranges.extend(settings["ranges"])
                super().__init__(*arguments, **settings)

        monkeypatch.setattr(module, "ImageRanges", Recorder)

    run_here(*command, prepare=record)
    assert [rows.start for rows in ranges] == [16, 24, 32, 40], "only what is missing"
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "whole")


def test_a_finished_cache_is_repaired(run_here, flags, tmp_path):
    command, folder = ["cache_latents", *flags, "--output_dir", tmp_path / "out"], tmp_path / "out"
    run_here(*command)
    before = files_in(folder)
    finished(folder)[1].unlink()
    finished(folder)[2].write_bytes(b"damaged")
    (folder / "data" / ".train-00003-of-00006.parquet.1.tmp").write_bytes(b"of a killed process")
    run_here(*command)
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--dtype", "float32"], "layout.dtype"),
        (["--random_flip", "false"], "layout.num_views"),
        (["--rows_per_shard", 16], "layout.rows_per_shard"),
        (["--batch_size", 4], "batch_size"),
        (["--resolution", 24], "resolution"),
        (["--mixed_precision", "bf16"], "mixed_precision"),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(run_here, flags, tmp_path, monkeypatch, change, name):
    command = ["cache_latents", *flags, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        run_here(*command, prepare=lambda module: stop_at(module, patch, 1, signal.SIGTERM))
    with pytest.raises(ValueError, match=rf"other settings:\n(.*\n)*  {name}: "):
        run_here(*command, *change)


def test_another_tokenizer_or_data_set_is_refused_in_the_same_folder(run_here, flags, tmp_path):
    command = ["cache_latents", *flags, "--output_dir", tmp_path / "out"]
    run_here(*command)
    tiny_autoencoder(seed=1, sample_size=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings:\n  encoder: "):
        run_here(*command, "--tokenizer_name_or_path", tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings:\n  data.digest: "):
        run_here(*command, "--split", "test")


def test_grids_become_sequences_and_a_data_set_without_labels_has_none(run_here, tmp_path):
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
    ).save_pretrained(tmp_path / "vae")
    images = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 90, 250)]
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": images}, features=features)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    places = ["--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    run_here("cache_latents", "--tokenizer_name_or_path", tmp_path / "vae", *places, "--resolution", 8)
    source = open_latents(tmp_path / "out")
    assert source.latent_shape == (16, 3) and source.metadata["grid"] == [4, 4]
    assert source.num_rows == source.metadata["num_unlabeled"] == 3 and source.id2label is None
    assert source.metadata["tokenizer"]["class"] == "AutoencoderKL"
    batch = next(iter(StreamingLatents(source, batch_size=3, seed=0)))
    assert batch["class_labels"].tolist() == [-1] * 3


def test_too_little_room_is_said_before_anything_is_encoded(run_here, flags, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    with pytest.raises(ValueError, match="The latents need .* GB more and `output_dir` .* make room"):
        run_here(
            "cache_latents",
            *flags,
            "--output_dir",
            tmp_path / "out",
            prepare=lambda module: monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage),
        )
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "0"], "`batch_size` must be at least 1, got 0"),
        (["--dataloader_num_workers", "-1"], "`dataloader_num_workers` must be 0 or more, got -1"),
        (["--dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
        (["--tokenizer", "x"], "unrecognized arguments: --tokenizer x"),
    ],
)
def test_bad_command_line_is_refused_with_its_flag(run_here, flags, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        run_here("cache_latents", *flags, *more, "--output_dir", tmp_path / "out")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_precision_of_the_launcher_is_refused_since_it_would_be_ignored(run_here, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="`mixed_precision` of the launcher is 'bf16' and of this script 'no'"):
        run_here("cache_latents", *flags, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_two_processes_that_are_killed_and_three_that_continue_write_the_files_of_one(launch, flags, tmp_path):
    conftest = sys.modules[launch.__module__]
    flags = [*flags, "--rows_per_shard", 2, "--batch_size", 1]
    one = launch("cache_latents", *flags, "--output_dir", tmp_path / "one")
    assert one.returncode == 0, one.stdout

    folder = tmp_path / "two"
    command = conftest.launch_command("cache_latents", *flags, "--output_dir", folder, processes=2)
    start_and_kill(command, lambda: len(finished(folder)) >= 3, conftest.launch_environment())
    assert 3 <= len(finished(folder)) < 21 and not (folder / "latents.json").exists()

    again = launch("cache_latents", *flags, "--output_dir", folder, processes=3)
    assert again.returncode == 0, again.stdout
    assert files_in(folder) == files_in(tmp_path / "one")
