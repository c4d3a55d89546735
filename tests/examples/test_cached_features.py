"""Features for the alignment (REPA) that `cache_latents.py` stores and `train_sit.py` takes in place of a teacher."""

import hashlib
import json
import os
import signal

import pytest
import torch

from maetok_hf.training.checkpointing import complete_checkpoints
from maetok_hf.training.teachers import load_teacher
from maetok_hf.training.token_features import mean_directions


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
