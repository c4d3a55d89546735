"""`train_sit.py`: a whole pipeline comes out, from cached latents or from images, however often it was interrupted."""

import dataclasses
import json
import signal
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf import AutoencoderMAE, MAETokDiffusionPipeline, SiTTransformer1DModel
from maetok_hf.models.latents import denormalize_latents
from maetok_hf.training.checkpointing import complete_checkpoints
from tests.loopback_hub import check_card
from tests.testing_utils import signal_before


MODES = ("cached", "online")


def entries(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture
def flags(flags_of):
    return flags_of("online")


@pytest.mark.parametrize("mode", MODES)
def test_result_is_a_loadable_pipeline_with_averaged_weights(run_here, flags_of, tokenizer_folder, tmp_path, mode):
    folder = tmp_path / "out"
    guidance = ["--guidance_scale", "1.25", "--guidance_interval", "0.25", "0.5", "--num_inference_steps", "3"]
    run_here("train_sit", *flags_of(mode), "--output_dir", folder, "--validation_steps", "4", *guidance)
    pipeline = MAETokDiffusionPipeline.from_pretrained(folder)
    assert pipeline.config.id2label == {0: "one", 1: "two", 2: "three"}
    assert pipeline.config.default_num_inference_steps == 3
    assert (pipeline.config.default_guidance_scale, pipeline.config.default_guidance_interval) == (1.25, [0.25, 0.5])
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

    pictures = [np.asarray(PIL.Image.open(folder / "validation" / f"step-{step}.png")) for step in (4, 8)]
    assert pictures[0].shape == pictures[1].shape == (2 * 16 + 2, 8 * 16 + 7 * 2, 3)
    assert (pictures[0] != pictures[1]).any()

    log = entries(folder)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert {"loss", "velocity", "gradient_norm", "learning_rate", "seconds"} <= log[0].keys()
    report = json.loads((folder / "train_report.json").read_text())
    assert report["final"] == log[-1]
    assert report["num_threads"] == torch.get_num_threads()


def test_the_pipeline_and_its_pictures_have_the_size_of_the_images(run_here, flags, tokenizer_folder, tmp_path):
    """Whatever size the tokenizer was built for; a run that is continued knows the tokenizer as it was given."""
    command = [*flags, "--resolution", "24", "--max_train_steps", "4", "--output_dir", tmp_path / "out"]
    for _ in range(2):
        run_here("train_sit", *command, "--validation_steps", "2")
    pipeline = MAETokDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    images, latents = (
        pipeline("two", num_inference_steps=2, output_type=kind, generator=torch.manual_seed(0)).images
        for kind in ("pt", "latent")
    )
    assert images.shape == (1, 3, 24, 24)
    given = AutoencoderMAE.from_pretrained(tokenizer_folder)
    assert given.config.sample_size == 16
    with torch.no_grad():
        expected = given.decode(denormalize_latents(latents, given.config), 24, 24).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=0)
    for step in (2, 4):
        picture = PIL.Image.open(tmp_path / "out" / "validation" / f"step-{step}.png")
        assert picture.size == (8 * 24 + 7 * 2, 2 * 24 + 2)


def test_cached_latents_are_those_of_their_images(run_here, flags_of, tmp_path):
    latents = {mode: {} for mode in MODES}

    def note(found):
        def prepare(module):
            inner = module.GeneratorTraining.make_inputs

            def make_inputs(self, step, batch):
                inputs = inner(self, step, batch)
                found.update(zip(batch["indices"].tolist(), inputs["latents"], strict=True))
                return inputs

            module.GeneratorTraining.make_inputs = make_inputs

        return prepare

    for mode, found in latents.items():
        flags = [*flags_of(mode), "--random_flip", "false", "--max_train_steps", "5", "--output_dir", tmp_path / mode]
        run_here("train_sit", *flags, prepare=note(found))
    both = latents["cached"].keys() & latents["online"].keys()
    assert len(both) >= 38
    for index in both:
        torch.testing.assert_close(latents["cached"][index], latents["online"][index], rtol=2e-3, atol=2e-3)


def test_latents_must_be_those_of_the_tokenizer(run_here, flags_of, tokenizer_folder, tmp_path):
    other = AutoencoderMAE.from_pretrained(tokenizer_folder)
    with torch.no_grad():
        other.encoder.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="latents"):
        run_here(
            "train_sit",
            *flags_of("cached"),
            "--tokenizer_name_or_path",
            tmp_path / "other",
            "--output_dir",
            tmp_path / "a",
        )
    with pytest.raises(ValueError, match="`resolution` is 32, but the latents in .* are of images of 16 pixels"):
        run_here("train_sit", *flags_of("cached"), "--resolution", "32", "--output_dir", tmp_path / "b")


def test_labels_must_exist_and_fit_the_number_of_classes(run_here, flags, tmp_path):
    from datasets import Image, load_dataset

    rows = load_dataset(str(flags[flags.index("--dataset_name") + 1]), split="train", cache_dir=str(tmp_path / "hf"))
    rows = rows.cast_column("image", Image(decode=False))
    names_unknown = rows.map(lambda row: {"index": row["label"]}, remove_columns="label")
    for name, table in (("none", rows.remove_columns("label")), ("numbers", names_unknown)):
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "train.parquet")

    def run(name, *more):
        command = [*flags, "--dataset_name", tmp_path / name, "--output_dir", tmp_path / f"{name}-out"]
        run_here("train_sit", *command, *more)

    with pytest.raises(ValueError, match="has no label column: name it with `label_column`"):
        run("none", "--model", "num_classes=3")
    numbers = ["--label_column", "index", "--max_train_steps", "4"]
    with pytest.raises(ValueError, match="does not say how many classes"):
        run("numbers", *numbers)
    with pytest.raises(ValueError, match="has the label 2, but the model has 2 classes"):
        run("numbers", *numbers, "--model", "num_classes=2")
    run("numbers", *numbers, "--model", "num_classes=3")


@pytest.mark.parametrize("mode", MODES)
def test_signal_saves_a_checkpoint_and_the_same_command_continues(
    run_here, flags_of, tmp_path, assert_same_result, mode
):
    flags = [*flags_of(mode), "--gradient_accumulation_steps", "2"]
    run_here("train_sit", *flags, "--output_dir", tmp_path / "whole")

    def send_signal_in_step(module):
        module.set_learning_rate = signal_before(module.set_learning_rate, 3, signal.SIGINT)

    command = ["train_sit", *flags, "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=send_signal_in_step)
    assert caught.value.code == 128 + signal.SIGINT
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    run_here(*command)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_fine_tuning_without_guidance_begins_with_the_outputs_of_the_trained_model(run_here, flags_of, tmp_path):
    flags = [*flags_of("cached"), "--max_train_steps", "2"]
    run_here("train_sit", *flags, "--output_dir", tmp_path / "first")
    tuning = [*flags, "--finetuning", "true", "--guidance_free", "true", "--learning_rate", "1.0e-12"]
    given = ["--pretrained_model_name_or_path", tmp_path / "first"]
    with pytest.raises(ValueError, match="names the pipeline that fine-tuning starts from"):
        run_here("train_sit", *tuning, "--output_dir", tmp_path / "second")
    run_here("train_sit", *tuning, *given, "--output_dir", tmp_path / "second")
    pipelines = [MAETokDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("first", "second")]
    assert pipelines[1].transformer.config.temperature_embedding
    latents = [
        pipeline(
            [0, 1, 2], guidance_scale=1.0, num_inference_steps=3, output_type="latent", generator=torch.manual_seed(0)
        ).images
        for pipeline in pipelines
    ]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-5)


def test_steps_that_are_not_finite_are_skipped(run_here, flags, tmp_path):
    def spoil(module):
        inner = module.GeneratorTraining.make_inputs

        def make_inputs(self, step, batch):
            inputs = inner(self, step, batch)
            return inputs | {"latents": inputs["latents"] * torch.nan} if step == 3 else inputs

        module.GeneratorTraining.make_inputs = make_inputs

    run_here("train_sit", *flags, "--output_dir", tmp_path / "run", prepare=spoil)
    assert [entry["skipped_steps"] for entry in entries(tmp_path / "run")] == [0, 0, 0, 1, 0, 0, 0, 0]
    pipeline = MAETokDiffusionPipeline.from_pretrained(tmp_path / "run")
    assert all(value.isfinite().all() for value in pipeline.transformer.state_dict().values())


def test_a_run_is_published_as_a_pipeline_with_its_card_and_picture(run_here, flags, tmp_path, hub):
    publish = ["--push_to_hub", "--hub_model_id", "user/squares", "--validation_steps", "4"]
    run_here("train_sit", *flags, *publish, "--output_dir", tmp_path / "run")
    files = hub.repositories["user/squares"].files
    for name, content in files.items():
        if name.endswith((".json", ".md")):
            assert str(tmp_path) not in content.decode(), name
    published = MAETokDiffusionPipeline.from_pretrained("user/squares")
    exported = MAETokDiffusionPipeline.from_pretrained(tmp_path / "run")
    for name, value in exported.transformer.state_dict().items():
        assert torch.equal(value, published.transformer.state_dict()[name])
    assert "samples.png" in files
    card = str(check_card("user/squares"))
    assert 'MAETokDiffusionPipeline.from_pretrained("user/squares")' in card and "SiTTransformer1DModel" in card


def test_class_dropout_is_drawn_by_the_trainer(run_here, flags, tmp_path):
    """With every label dropped only the null class's embedding is trained."""
    for name, probability in (("all", "1.0"), ("none", "0.0")):
        more = ["--output_dir", tmp_path / name, "--model", f"class_dropout_prob={probability}"]
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
        run_here(*command, "--latents_name_or_path", tmp_path)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_every_flag_is_read(run_here, flags_of, full_recipe, tmp_path, hub):
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

    short = ["--max_train_steps", "3", "--lr_scheduler", "cosine", "--push_to_hub"]
    short += ["--gradient_checkpointing", "--gradient_checkpointing_share", "0.5"]
    for mode in MODES:
        run_here("train_sit", *flags_of(mode), *short, "--output_dir", tmp_path / mode, prepare=prepare)
    aligned = [
        "--alignment_weight",
        "0.5",
        "--alignment_model",
        full_recipe.parent / "dinov2",
        "--alignment_layer",
        "1",
    ]
    run_here("train_sit", *flags_of("online"), *short, *aligned, "--output_dir", tmp_path / "aligned", prepare=prepare)
    assert "alignment" in entries(tmp_path / "aligned")[0]
    fields = {field.name for cls in classes.values() for field in dataclasses.fields(cls)}
    assert fields - reads == set()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("online", 1), ("cached", 2)])
def test_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    launch, run_here, flags_of, tmp_path, assert_same_result, mode, processes
):
    """Killed within a step, within a save, and between the last checkpoint and the export."""
    flags = [*flags_of(mode), "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"]
    if processes == 1:
        run_here("train_sit", *flags, "--output_dir", tmp_path / "whole")
    else:
        whole = launch("train_sit", *flags, "--output_dir", tmp_path / "whole", processes=processes, anew=True)
        assert whole.returncode == 0, whole.stdout
    command = ["train_sit", *flags, "--output_dir", tmp_path / "stopped"]
    for fault, newest in (("backward:8:KILL:0", 2), ("flush:2:KILL:0", 4), ("export:1:KILL:0", 8)):
        stopped = launch(*command, processes=processes, fault=fault)
        assert stopped.returncode != 0
        assert complete_checkpoints(tmp_path / "stopped")[-1].name == f"checkpoint-{newest}", stopped.stdout
    finished = launch(*command, processes=processes)
    assert finished.returncode == 0, finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_fine_tuning_keeps_the_names_of_the_classes_and_refuses_others(run_here, flags_of, tmp_path):
    flags = [*flags_of("cached"), "--max_train_steps", "2"]
    run_here("train_sit", *flags, "--output_dir", tmp_path / "first")
    index = tmp_path / "first" / "model_index.json"
    tuning = [*flags, "--finetuning", "true", "--pretrained_model_name_or_path", tmp_path / "first"]
    index.write_text(index.read_text().replace('"one"', '"one, uno"'))
    run_here("train_sit", *tuning, "--output_dir", tmp_path / "second")
    names = MAETokDiffusionPipeline.from_pretrained(tmp_path / "second").config.id2label
    assert names == {0: "one, uno", 1: "two", 2: "three"}
    index.write_text(index.read_text().replace('"one, uno"', '"eins"'))
    with pytest.raises(ValueError, match="class 0 is 'one' in the data set, but 'eins' in"):
        run_here("train_sit", *tuning, "--output_dir", tmp_path / "third")


def test_samples_cannot_be_guided_without_a_null_class(run_here, flags, tmp_path):
    more = ["--model", "class_dropout_prob=0.0", "--guidance_scale", "1.5", "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="`guidance_scale` is 1.5, but the transformer is trained without dropping"):
        run_here("train_sit", *flags, *more)
