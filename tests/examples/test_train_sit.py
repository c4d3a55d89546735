"""`train_sit.py`: a whole pipeline comes out, from cached latents or from images, however often it was interrupted."""

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

from maetok_hf import AutoencoderMAE, MAETokDiffusionPipeline, SiTTransformer1DModel
from maetok_hf.training.checkpointing import complete_checkpoints


MODES = {"cached": ["--cache_latents"], "online": []}


def entries(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer with random weights and made-up statistics."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = AutoencoderMAE(
            sample_size=16,
            patch_size=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=1,
            num_latent_tokens=4,
            latent_channels=2,
            layer_scale_init_value=0.5,
            latents_mean=0.1,
            latents_std=0.4,
        )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def flags(recipes, base_flags, tokenizer_folder):
    tokenizer = ["--tokenizer_name_or_path", tokenizer_folder]
    return ["--recipe", recipes["sit"], *base_flags, *tokenizer, "--checkpointing_steps", "2"]


@pytest.mark.parametrize("mode", MODES)
def test_result_is_a_loadable_pipeline_with_averaged_weights(run_here, flags, tokenizer_folder, tmp_path, mode):
    folder = tmp_path / "out"
    run_here("train_sit", *flags, *MODES[mode], "--output_dir", folder)
    pipeline = MAETokDiffusionPipeline.from_pretrained(folder)
    assert pipeline.config.id2label == {0: "one", 1: "two", 2: "three"}
    assert pipeline.transformer.config.num_classes == 3
    average = SiTTransformer1DModel.from_pretrained(folder / "checkpoint-8" / "transformer_ema")
    online = SiTTransformer1DModel.from_pretrained(folder / "checkpoint-8" / "transformer")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    assert not torch.equal(average.proj_out.weight, online.proj_out.weight)
    tokenizer = AutoencoderMAE.from_pretrained(tokenizer_folder)
    for name, value in pipeline.vae.state_dict().items():
        assert torch.equal(value, tokenizer.state_dict()[name])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("two", num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()

    log = entries(folder)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert {"loss", "gradient_norm", "learning_rate", "seconds"} <= log[0].keys()
    report = json.loads((folder / "train_report.json").read_text())
    assert report["final"] == log[-1]
    assert report["num_threads"] == torch.get_num_threads()


def test_cached_latents_are_the_normalised_ones_of_both_views(run_here, flags, tokenizer_folder, tmp_path):
    from maetok_hf.data import HeldOutImages, open_images, to_pixel_values

    run_here("train_sit", *flags, "--cache_latents", "--output_dir", tmp_path / "out", "--max_train_steps", "1")
    cached = np.load(tmp_path / "out" / "latents" / "latents.npy")
    labels = np.load(tmp_path / "out" / "latents" / "labels.npy")
    tokenizer = AutoencoderMAE.from_pretrained(tokenizer_folder)
    source = open_images(flags[flags.index("--dataset_name") + 1], split="train", cache_dir=tmp_path / "cache")
    images = HeldOutImages(source, resolution=16, batch_size=8).stacked()
    with torch.no_grad():
        pixel_values = to_pixel_values(images["images"])
        for view, pixels in enumerate((pixel_values, pixel_values.flip(-1))):
            expected = (tokenizer.encode(pixels).latent - 0.1) / 0.4
            actual = torch.from_numpy(cached[view][images["indices"].numpy()])
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (labels[images["indices"].numpy()] == images["class_labels"].numpy()).all()
    assert labels[7] == -1  # the corrupt row


def test_cached_latents_are_made_once(run_here, flags, tmp_path, capsys):
    flags = [*flags, "--cache_latents", "--output_dir", tmp_path / "out"]
    run_here("train_sit", *flags)
    assert "Encoding 41 images once" in capsys.readouterr().out
    run_here("train_sit", *flags)
    assert "Encoding" not in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_labels_must_exist_and_fit_the_number_of_classes(run_here, flags, tmp_path, mode):
    from datasets import Image, load_dataset

    rows = load_dataset(str(flags[flags.index("--dataset_name") + 1]), split="train", cache_dir=str(tmp_path / "hf"))
    rows = rows.cast_column("image", Image(decode=False))
    names_unknown = rows.map(lambda row: {"index": row["label"]}, remove_columns="label")
    for name, table in (("none", rows.remove_columns("label")), ("numbers", names_unknown)):
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")

    def run(name, *more):
        command = [*flags, *MODES[mode], "--dataset_name", tmp_path / name, "--output_dir", tmp_path / f"{name}-out"]
        run_here("train_sit", *command, *more)

    with pytest.raises(ValueError, match="has no label column: name it with `label_column`"):
        run("none", "--model", "num_classes=3")
    numbers = ["--label_column", "index", "--max_train_steps", "4"]
    with pytest.raises(ValueError, match="does not say how many classes"):
        run("numbers", *numbers)
    with pytest.raises(ValueError, match="has the label 2, but `model` sets num_classes=2"):
        run("numbers", *numbers, "--model", "num_classes=2")
    run("numbers", *numbers, "--model", "num_classes=3")


@pytest.mark.parametrize("mode", MODES)
def test_signal_saves_a_checkpoint_and_the_same_command_continues(run_here, flags, tmp_path, assert_same_result, mode):
    flags = [*flags, *MODES[mode], "--gradient_accumulation_steps", "2"]
    run_here("train_sit", *flags, "--output_dir", tmp_path / "whole")

    def send_signal_in_step(module):
        set_learning_rate = module.set_learning_rate
        calls = []

        def wrapped(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return set_learning_rate(*arguments)

        module.set_learning_rate = wrapped

    command = ["train_sit", *flags, "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=send_signal_in_step)
    assert caught.value.code == 128 + signal.SIGINT
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    run_here(*command)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_class_dropout_is_drawn_by_the_trainer(run_here, flags, tmp_path):
    """With every label dropped only the null class's embedding is trained."""
    for name, probability in (("all", "1.0"), ("none", "0.0")):
        more = ["--output_dir", tmp_path / name, "--model", f"class_dropout_prob={probability}", "--cache_latents"]
        run_here("train_sit", *flags, *more)
        moments = torch.load(tmp_path / name / "checkpoint-8" / "optimizer.bin", weights_only=True)["state"]
        (table,) = [state["exp_avg"] for state in moments.values() if state["exp_avg"].shape == (4, 16)]
        trained = table.abs().sum(dim=1) > 0
        assert trained.tolist() == ([False] * 3 + [True] if name == "all" else [True] * 3 + [False])


def test_other_tokenizer_does_not_continue_a_run(run_here, flags, tokenizer_folder, tmp_path):
    run_here("train_sit", *flags, "--output_dir", tmp_path / "out", "--max_train_steps", "2")
    other = AutoencoderMAE.from_pretrained(tokenizer_folder)
    other.register_to_config(latents_std=0.5)
    other.save_pretrained(tmp_path / "other")
    command = [*flags, "--tokenizer_name_or_path", tmp_path / "other", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="tokenizer: .* there, .* now"):
        run_here("train_sit", *command, "--max_train_steps", "2")


def test_wrong_input_ends_the_run_before_the_first_step(run_here, flags, tokenizer_folder, tmp_path):
    command = ["train_sit", *flags, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="sets num_classes=7, but the data set has 3 classes"):
        run_here(*command, "--model", "num_classes=7")
    plain = AutoencoderMAE.from_pretrained(tokenizer_folder)
    plain.register_to_config(latents_mean=None, latents_std=None)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no `latents_mean`"):
        run_here(*command, "--tokenizer_name_or_path", tmp_path / "plain")
    with pytest.raises(ValueError, match="`resolution` is 18, but must be a multiple of the tokenizer's patches of 4"):
        run_here(*command, "--resolution", "18")
    with pytest.raises(SystemExit):
        run_here(*command, "--cache_latents", "--num_streams", "2")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_every_flag_is_read(run_here, flags, tmp_path):
    from maetok_hf.training.run_options import SiTRunOptions
    from maetok_hf.training.sit_recipe import SiTRecipe

    reads, classes = set(), {"SiTRecipe": SiTRecipe, "SiTRunOptions": SiTRunOptions}

    def recording(cls):
        class Recording(cls):
            def __getattribute__(self, name):
                # `dataclasses.asdict` reads everything and uses nothing
                if sys._getframe(1).f_globals["__name__"] != "dataclasses":
                    reads.add(name)
                return super().__getattribute__(name)

        return Recording

    def prepare(module):
        for name, cls in classes.items():
            setattr(module, name, recording(cls))
        parse = module.parse_arguments

        def parse_arguments(*arguments):
            before = set(reads)
            settings = parse(*arguments)
            # what the checks of the values have read is not yet used
            reads.intersection_update(before)
            return settings

        module.parse_arguments = parse_arguments

    short = ["--max_train_steps", "3", "--lr_scheduler", "cosine"]
    for mode, more in MODES.items():
        run_here("train_sit", *flags, *more, *short, "--output_dir", tmp_path / mode, prepare=prepare)
    fields = {field.name for cls in classes.values() for field in dataclasses.fields(cls)}
    assert fields - reads == set()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("online", 1), ("cached", 2)])
def test_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    launch, run_here, flags, tmp_path, assert_same_result, mode, processes
):
    """Killed within a step, within a save, and between the last checkpoint and the export."""
    flags = [*flags, *MODES[mode], "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"]
    if processes == 1:
        run_here("train_sit", *flags, "--output_dir", tmp_path / "whole")
    else:
        whole = launch("train_sit", *flags, "--output_dir", tmp_path / "whole", processes=processes)
        assert whole.returncode == 0, whole.stdout
    command = ["train_sit", *flags, "--output_dir", tmp_path / "stopped"]
    for fault, newest in (("backward:8:KILL:0", 2), ("flush:2:KILL:0", 4), ("export:1:KILL:0", 8)):
        stopped = launch(*command, processes=processes, fault=fault)
        assert stopped.returncode != 0
        assert complete_checkpoints(tmp_path / "stopped")[-1].name == f"checkpoint-{newest}", stopped.stdout
    finished = launch(*command, processes=processes)
    assert finished.returncode == 0, finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")
