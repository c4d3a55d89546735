"""`train_sit_lora.py`: an adapter comes out that a pipeline takes up, however often the run was interrupted."""

import dataclasses
import json
import shutil
import signal
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from maetok_hf import AutoencoderMAE, FlowMatchEulerMaruyamaScheduler, MAETokDiffusionPipeline, SiTTransformer1DModel
from maetok_hf.pipelines.lora import WEIGHT_NAME, load_lora_into
from maetok_hf.training.checkpointing import complete_checkpoints, model_digest
from maetok_hf.training.recipes import load_recipe
from tests.examples.conftest import EXAMPLES
from tests.loopback_hub import check_card
from tests.testing_utils import randomize_parameters, signal_before


RECIPE = """
resolution: 16
rank: 2
lora_dropout: 0.1
total_batch_size: 4
max_train_steps: 6
learning_rate: 1.0e-2
ema_decay: 0.5
num_inference_steps: 2
"""


def make_pipeline(folder, **settings):
    """A pipeline with random weights that knows the classes `one` and `two`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = AutoencoderMAE(
            sample_size=16, patch_size=4, hidden_size=16, num_layers=1, num_attention_heads=1, num_latent_tokens=4,
            latent_channels=2, layer_scale_init_value=0.5, latents_mean=0.1, latents_std=0.4,
        )  # fmt: skip
        transformer = SiTTransformer1DModel(
            sample_size=4, in_channels=2, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=2,
            **settings,
        )  # fmt: skip
    randomize_parameters(transformer)
    names = {0: "one", 1: "two, zwei"}
    MAETokDiffusionPipeline(tokenizer, transformer, FlowMatchEulerMaruyamaScheduler(), names).save_pretrained(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder per class: `zwei` is known, `four` is new."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("four", 6), ("zwei", 5)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def flags(base, images, tmp_path):
    (tmp_path / "lora.yaml").write_text(RECIPE)
    words = ["--recipe", tmp_path / "lora.yaml", "--pretrained_model_name_or_path", base, "--dataset_name", images]
    return [*words, "--cache_dir", tmp_path / "cache", "--logging_steps", "1", "--checkpointing_steps", "2"]


def noted(module, found):
    """Have a run leave itself in a list."""

    class Noted(module.LoraTraining):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            found.append(self)

    module.LoraTraining = Noted


def digests(folder):
    components = MAETokDiffusionPipeline.from_pretrained(folder).components
    return {name: model_digest(components[name]) for name in ("vae", "transformer")}


def test_result_is_an_adapter_and_the_pipeline_stays_as_it_was(run_here, flags, base, tmp_path, capsys):
    found, folder = [], tmp_path / "out"
    given = digests(base)
    pictures = ["--validation_steps", "4", "--num_validation_images", "3"]
    run_here("train_sit_lora", *flags, *pictures, "--output_dir", folder, prepare=lambda module: noted(module, found))
    printed = capsys.readouterr().out
    assert "'four': new class 2\n" in printed and "'zwei': known class 1\n" in printed

    (training,) = found
    before = MAETokDiffusionPipeline.from_pretrained(base)
    before.transformer.add_classes(1)
    state = {
        name.replace(".base_layer", ""): value
        for name, value in training.transformer.state_dict().items()
        if "lora_" not in name
    }
    assert state.keys() == before.transformer.state_dict().keys()
    for name, value in before.transformer.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, value in before.vae.state_dict().items():
        assert torch.equal(value, training.tokenizer.state_dict()[name]), name
    assert digests(base) == given

    exported = load_file(folder / WEIGHT_NAME)
    averaged = load_file(folder / "checkpoint-6" / "adapter_ema" / WEIGHT_NAME)
    assert exported.keys() == averaged.keys() == load_file(folder / "checkpoint-6" / "adapter" / WEIGHT_NAME).keys()
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    assert not torch.equal(
        exported["class_embed.lora_embedding_B"], training.adapter.state_dict()["class_embed.lora_embedding_B"]
    )
    shots = [np.asarray(PIL.Image.open(folder / "validation" / f"step-{step}.png")) for step in (4, 6)]
    assert (shots[0] != shots[1]).any()
    report = json.loads((folder / "train_report.json").read_text())
    assert report["new_classes"] == ["four"] and report["trained_classes"] == [1, 2]
    assert report["num_parameters"] == sum(value.numel() for value in exported.values())


def test_the_adapter_of_a_run_loads_scales_fuses_and_unloads(run_here, flags, base, tmp_path):
    run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "out")
    for source in (tmp_path / "out", tmp_path / "out" / "checkpoint-4" / "adapter_ema"):
        pipeline = MAETokDiffusionPipeline.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)

        def sample(label, pipeline=pipeline):
            settings = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(0)}
            return pipeline(label, **settings).images

        before = sample("one")
        name = load_lora_into(pipeline, source)
        adapted = {label: sample(label) for label in ("one", "zwei", "four")}
        assert not torch.allclose(adapted["one"], before, atol=1e-4)
        assert not torch.allclose(adapted["four"], adapted["zwei"], atol=1e-4)
        pipeline.transformer.set_adapters(name, 0.0)
        torch.testing.assert_close(sample("one"), before, rtol=0, atol=0)
        pipeline.transformer.set_adapters(name, 1.0)
        pipeline.transformer.fuse_lora()
        torch.testing.assert_close(sample("four"), adapted["four"], rtol=1e-3, atol=1e-4)
        pipeline.transformer.unfuse_lora()
        pipeline.transformer.unload_lora()
        torch.testing.assert_close(sample("one"), before, rtol=1e-3, atol=1e-4)


def test_known_classes_alone_leave_the_class_table_alone(run_here, flags, base, images, tmp_path):
    shutil.copytree(images / "zwei", tmp_path / "known" / "two")
    shutil.copytree(images / "four", tmp_path / "known" / "one")
    run_here("train_sit_lora", *flags, "--dataset_name", tmp_path / "known", "--output_dir", tmp_path / "out")
    assert not any("class_embed" in name for name in load_file(tmp_path / "out" / WEIGHT_NAME))
    pipeline = MAETokDiffusionPipeline.from_pretrained(base)
    before = model_digest(pipeline.transformer)
    load_lora_into(pipeline, tmp_path / "out")
    pipeline.transformer.unload_lora()
    assert model_digest(pipeline.transformer) == before


def test_labels_are_those_of_the_model_and_the_loss_falls(run_here, flags, images, tmp_path):
    labels, rows = set(), {}

    def note(module):
        inner = module.LoraTraining.make_inputs

        def make_inputs(self, step, batch):
            inputs = inner(self, step, batch)
            labels.update(inputs["class_labels"].tolist())
            rows.update(zip(batch["indices"].tolist(), inputs["class_labels"].tolist(), strict=True))
            return inputs

        module.LoraTraining.make_inputs = make_inputs

    more = ["--max_train_steps", "60", "--checkpointing_steps", "60", "--rank", "8", "--output_dir", tmp_path / "out"]
    run_here("train_sit_lora", *flags, *more, prepare=note)
    assert labels == {1, 2} and [rows[index] for index in sorted(rows)] == [2] * 6 + [1] * 5
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])


def test_signal_saves_a_checkpoint_and_the_same_command_continues(run_here, flags, tmp_path, assert_same_result):
    flags = [*flags, "--gradient_accumulation_steps", "2"]
    run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "whole")

    def send_signal_in_step(module):
        module.set_learning_rate = signal_before(module.set_learning_rate, 3)

    command = ["train_sit_lora", *flags, "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=send_signal_in_step)
    assert caught.value.code == 128 + signal.SIGTERM
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    run_here(*command)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_pictures_change_nothing(run_here, flags, tmp_path, assert_same_result):
    run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "without")
    run_here("train_sit_lora", *flags, "--validation_steps", "1", "--output_dir", tmp_path / "with")
    assert_same_result(tmp_path / "without", tmp_path / "with")


def test_a_model_trained_without_guidance_is_fine_tuned_so(run_here, flags, tmp_path):
    make_pipeline(tmp_path / "gft", temperature_embedding=True)
    found = []
    command = [*flags, "--pretrained_model_name_or_path", tmp_path / "gft", "--max_train_steps", "2"]
    run_here(
        "train_sit_lora",
        *[*command, "--guidance_scale", "2.0", "--output_dir", tmp_path / "out"],
        prepare=lambda module: noted(module, found),
    )
    assert found[0].model.guidance_free
    load_lora_into(MAETokDiffusionPipeline.from_pretrained(tmp_path / "gft"), tmp_path / "out")


def test_steps_that_are_not_finite_are_skipped(run_here, flags, tmp_path):
    def spoil(module):
        inner = module.LoraTraining.make_inputs

        def make_inputs(self, step, batch):
            inputs = inner(self, step, batch)
            return inputs | {"latents": inputs["latents"] * torch.nan} if step == 3 else inputs

        module.LoraTraining.make_inputs = make_inputs

    run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "run", prepare=spoil)
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 0, 1, 0, 0]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / WEIGHT_NAME).values())


def test_a_run_is_published_as_an_adapter_with_its_card_and_picture(run_here, flags, base, tmp_path, hub):
    publish = ["--push_to_hub", "--hub_model_id", "user/squares", "--validation_steps", "2"]
    run_here("train_sit_lora", *flags, *publish, "--output_dir", tmp_path / "run")
    files = hub.repositories["user/squares"].files
    assert files.keys() >= {WEIGHT_NAME, "lora_info.json", "README.md", "samples.png"}
    for name, content in files.items():
        if name.endswith((".json", ".md")):
            assert str(base.parent) not in content.decode() and str(tmp_path) not in content.decode(), name
    pipelines = [MAETokDiffusionPipeline.from_pretrained(base) for _ in range(2)]
    load_lora_into(pipelines[0], tmp_path / "run")
    load_lora_into(pipelines[1], "user/squares")
    assert model_digest(pipelines[0].transformer) == model_digest(pipelines[1].transformer)
    hub.repositories["user/squares"].private = True
    with pytest.raises(OSError, match="(?s)user/squares.*private repo.*token"):
        load_lora_into(pipelines[1], "user/squares", token=False, cache_dir=tmp_path / "stranger")
    card = str(check_card("user/squares"))
    assert 'load_lora_into(pipe, "user/squares")' in card and "| four | 2 | new |" in card
    assert "| two, zwei | 1 | known to the pipeline |" in card and "None" not in card.split("## Limits")[1]


def test_wrong_input_ends_the_run_before_the_first_step(run_here, flags, base, images, tmp_path, data_folder):
    command = ["train_sit_lora", *flags, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"`resolution` is 32, but .* images of 16 pixels: give `--resolution 16`"):
        run_here(*command, "--resolution", "32")
    with pytest.raises(ValueError, match="`lora_layers` names 'to_w'"):
        run_here(*command, "--lora_layers", "to_w")
    nameless = MAETokDiffusionPipeline.from_pretrained(base)
    nameless.register_to_config(id2label=None)
    nameless.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="has no `id2label`"):
        run_here(*command, "--pretrained_model_name_or_path", tmp_path / "nameless")
    with pytest.raises(ValueError, match="global batch"):
        run_here(*command, "--total_batch_size", "12")
    for unknown in (["--ema", "0.9"], ["--guidance_free", "true"], ["--guidance_interval", "0.1", "0.5"]):
        with pytest.raises(SystemExit):
            run_here(*command, *unknown)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_sharded_runs_are_refused(run_here, flags, tmp_path):
    def prepare(module):
        class Sharded(module.TrainingRun):
            def __init__(self, *arguments, **settings):
                super().__init__(*arguments, **settings)
                self.accelerator.state.distributed_type = DistributedType.FSDP

        module.TrainingRun = Sharded

    with pytest.raises(ValueError, match="is FSDP, but an adapter has too few .*accelerate_configs/ddp.yaml"):
        run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "out", prepare=prepare)


def test_other_classes_or_another_pipeline_do_not_continue_a_run(run_here, flags, base, tmp_path):
    run_here("train_sit_lora", *flags, "--output_dir", tmp_path / "out", "--max_train_steps", "2")
    for name, change in (
        ("labels", lambda pipeline: pipeline.register_to_config(id2label={0: "zwei", 1: "two"})),
        ("weights", lambda pipeline: pipeline.transformer.proj_out.bias.data.add_(1)),
    ):
        other = MAETokDiffusionPipeline.from_pretrained(base)
        change(other)
        other.save_pretrained(tmp_path / name)
        command = [*flags, "--pretrained_model_name_or_path", tmp_path / name, "--output_dir", tmp_path / "out"]
        what = {"labels": "classes", "weights": "pipeline.transformer"}[name]
        with pytest.raises(ValueError, match=f"{what}: .* there, .* now"):
            run_here("train_sit_lora", *command, "--max_train_steps", "4")


def test_shipped_recipe_loads():
    from maetok_hf.training.lora_recipe import LoraRecipe

    path = EXAMPLES / "recipes" / "sit-lora.yaml"
    assert load_recipe(LoraRecipe, path).rank == 16
    assert path.read_text().startswith("# Expected: ")


def test_every_flag_is_read(run_here, flags, tmp_path, hub):
    from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions

    reads, classes = set(), {"LoraRecipe": LoraRecipe, "LoraRunOptions": LoraRunOptions}

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
    run_here("train_sit_lora", *flags, *short, "--output_dir", tmp_path / "out", prepare=prepare)
    fields = {field.name for cls in classes.values() for field in dataclasses.fields(cls)}
    assert fields - reads == set()


@pytest.mark.slow
def test_interrupted_run_of_two_processes_equals_the_uninterrupted_one_bit_for_bit(
    launch, flags, tmp_path, assert_same_result
):
    """Killed within a step, within a save, and between the last checkpoint and the export."""
    whole = launch("train_sit_lora", *flags, "--output_dir", tmp_path / "whole", processes=2, anew=True)
    assert whole.returncode == 0, whole.stdout
    command = ["train_sit_lora", *flags, "--output_dir", tmp_path / "stopped"]
    for fault, newest in (("backward:3:KILL:0", 2), ("flush:2:KILL:0", 4), ("export:1:KILL:0", 6)):
        stopped = launch(*command, processes=2, fault=fault)
        assert stopped.returncode != 0
        assert complete_checkpoints(tmp_path / "stopped")[-1].name == f"checkpoint-{newest}", stopped.stdout
    finished = launch(*command, processes=2)
    assert finished.returncode == 0, finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")
