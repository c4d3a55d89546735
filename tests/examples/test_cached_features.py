"""Features for the alignment (REPA) that `cache_latents.py` stores and `train_sit.py` takes in place of a teacher."""

import hashlib
import itertools
import json
import os
import shutil
import signal

import pytest
import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.data import StreamingImages, open_images, to_pixel_values
from maetok_hf.models.latents import normalize_latents
from maetok_hf.training.checkpointing import complete_checkpoints
from maetok_hf.training.latent_encoding import encode_tokens
from maetok_hf.training.teachers import load_teacher
from maetok_hf.training.token_features import mean_directions, stored_digest


@pytest.fixture
def teacher(full_recipe):
    return full_recipe.parent / "dinov2"


@pytest.fixture
def cache_flags(tokenizer_folder, data_folder, teacher, tmp_path):
    flags = ["--tokenizer_name_or_path", tokenizer_folder, "--dataset_name", data_folder, "--resolution", 16]
    flags += ["--rows_per_shard", 16, "--batch_size", 3, "--cache_dir", tmp_path / "cache"]
    return [*flags, "--alignment_model", teacher]


def align(teacher):
    return ["--alignment_weight", "0.5", "--alignment_model", teacher, "--alignment_layer", "1"]


def files_in(folder):
    return {path.name: hashlib.sha1(path.read_bytes()).hexdigest() for path in (folder / "data").iterdir()}


def note_inputs(found):
    """A hook that keeps what the objective is given of every image."""

    def prepare(module):
        inner = module.GeneratorTraining.make_inputs

        def make_inputs(self, step, batch):
            inputs = inner(self, step, batch)
            for place, index in enumerate(batch["indices"].tolist()):
                found[index] = {name: value[place] for name, value in inputs.items()}
            return inputs

        module.GeneratorTraining.make_inputs = make_inputs

    return prepare


def test_training_takes_the_features_that_the_teacher_gives_of_the_image(
    run_here, cache_flags, flags_of, recipes, teacher, tokenizer_folder, tmp_path, assert_same_result
):
    run_here("cache_latents", *cache_flags, "--output_dir", tmp_path / "latents")
    said = json.loads((tmp_path / "latents" / "latents.json").read_text())["alignment"]
    assert (said["model"], said["dtype"], said["patches_per_token"]) == ("dinov2", "bfloat16", 4)
    target = load_teacher("dinov2", teacher, patch_size=4)
    assert said["stored_digest"] == stored_digest(teacher)
    assert said["num_bytes"] == 40 * 2 * 4 * target.feature_dim * 2
    card = (tmp_path / "latents" / "README.md").read_text()
    assert "`dinov2`" in card and "`features_mirrored`" in card and str(tmp_path) not in card

    cached = ["--recipe", recipes["sit"], "--latents_name_or_path", tmp_path / "latents", "--logging_steps", "1"]
    cached += ["--tokenizer_name_or_path", tokenizer_folder, "--checkpointing_steps", "2", *align(teacher)]
    found, images = {}, {}
    still = ["--random_flip", "false", "--max_train_steps", "4"]
    run_here("train_sit", *cached, *still, "--output_dir", tmp_path / "still", prepare=note_inputs(found))
    run_here(
        *("train_sit", *flags_of("online"), *still, *align(teacher)),
        *("--output_dir", tmp_path / "online"),
        prepare=note_inputs(images),
    )
    both = found.keys() & images.keys()
    assert len(both) > 20
    for index in both:
        pixel_values = images[index]["pixel_values"]
        expected = mean_directions(target(pixel_values.unsqueeze(0)), 4)[0]
        torch.testing.assert_close(found[index]["token_features"].float(), expected, atol=5e-3, rtol=0)

    # interrupted and continued, with both views
    run_here("train_sit", *cached, "--max_train_steps", "4", "--output_dir", tmp_path / "whole")
    entry = json.loads((tmp_path / "whole" / "training_log.jsonl").read_text().splitlines()[0])
    assert -1 <= entry["alignment"] <= 1

    def send_signal(module):
        set_learning_rate, calls = module.set_learning_rate, []

        def wrapped(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return set_learning_rate(*arguments)

        module.set_learning_rate = wrapped

    command = ["train_sit", *cached, "--max_train_steps", "4", "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit):
        run_here(*command, prepare=send_signal)
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    run_here(*command)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


@pytest.fixture
def images_of(data_folder, tmp_path):
    """The images of the training data by their index, of shape (1, 3, 16, 16), not mirrored."""
    source = open_images(str(data_folder), cache_dir=str(tmp_path / "cache"))
    stream = StreamingImages(source, resolution=16, batch_size=1, seed=0, random_flip=False)
    batches = itertools.islice(stream.dataloader(), stream.micro_batches_per_epoch)
    return {int(batch["indices"]): to_pixel_values(batch["images"], "cpu") for batch in batches}


def test_the_mirrored_latents_come_with_the_features_of_the_mirrored_image(
    run_here, cache_flags, recipes, teacher, tokenizer_folder, images_of, tmp_path
):
    run_here("cache_latents", *cache_flags, "--alignment_dtype", "float32", "--output_dir", tmp_path / "latents")
    flags = ["--recipe", recipes["sit"], "--latents_name_or_path", tmp_path / "latents", *align(teacher)]
    flags += ["--alignment_dtype", "float32", "--tokenizer_name_or_path", tokenizer_folder]
    found = {}
    run_here(
        *("train_sit", *flags, "--max_train_steps", "4", "--output_dir", tmp_path / "run"),
        prepare=note_inputs(found),
    )
    tokenizer = AutoencoderMAE.from_pretrained(tokenizer_folder)
    target = load_teacher("dinov2", teacher, patch_size=4, dtype=torch.float32)
    mirrored = []
    for index in found.keys() & images_of.keys():
        views = torch.cat([images_of[index], images_of[index].flip(-1)])
        latents = normalize_latents(encode_tokens(tokenizer, views), tokenizer.config)
        features = mean_directions(target(views), 4)
        errors = [
            [(of_view - found[index][name].float()).abs().max().item() for of_view in of_views]
            for name, of_views in (("latents", latents), ("token_features", features))
        ]
        for right, wrong in map(sorted, errors):
            assert right < 5e-3 < wrong, "the views can be told apart"
        view, view_of_features = (error.index(min(error)) for error in errors)
        assert view == view_of_features
        mirrored.append(view)
    assert 5 < sum(mirrored) < len(mirrored) - 5


def test_another_teacher_of_the_same_name_is_refused_before_any_work(
    run_here, cache_flags, recipes, teacher, tokenizer_folder, tmp_path
):
    run_here("cache_latents", *cache_flags, "--output_dir", tmp_path / "latents")
    other = shutil.copytree(teacher, tmp_path / "dinov2")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.1, 0.2, 0.3]}))
    command = ["train_sit", "--recipe", recipes["sit"], "--latents_name_or_path", tmp_path / "latents"]
    command += ["--tokenizer_name_or_path", tokenizer_folder, *align(other), "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=r"`alignment_model` '.*dinov2' \(digest \w+\) has other weights, or other"):
        run_here(*command)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_cache_of_features_continues_with_the_same_teacher_only(
    run_here, cache_flags, teacher, tmp_path, monkeypatch
):
    run_here("cache_latents", *cache_flags, "--output_dir", tmp_path / "whole")
    command = ["cache_latents", *cache_flags, "--output_dir", tmp_path / "stopped"]

    def stop(module):
        encode, calls = module.TokenFeatureEncoder.__call__, []

        def encode_and_stop(self, images):
            calls.append(1)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return encode(self, images)

        patch.setattr(module.TokenFeatureEncoder, "__call__", encode_and_stop)

    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        run_here(*command, prepare=stop)
    for change, name in (
        (cache_flags[:-2], r"alignment"),
        ([*cache_flags, "--alignment_dtype", "float32"], r"alignment\.d"),
    ):
        with pytest.raises(ValueError, match=rf"other settings:\n(.*\n)*  {name}"):
            run_here("cache_latents", *change, "--output_dir", tmp_path / "stopped")
    run_here(*command)
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "whole")


def test_latents_without_features_are_refused_before_any_work(run_here, flags_of, tmp_path):
    with pytest.raises(ValueError, match=r"needs features of 'nowhere' in bfloat16, but .* hold none"):
        run_here("train_sit", *flags_of("cached"), *align("nowhere"), "--output_dir", tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
