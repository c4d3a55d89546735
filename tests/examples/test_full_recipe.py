"""`train_maetok.py` with every loss: what it leaves, what it survives, and that every setting is used."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from maetok_hf import AutoencoderMAE
from maetok_hf.training.checkpointing import complete_checkpoints
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from tests.loopback_hub import QUOTA_MESSAGE, check_card
from tests.testing_utils import signal_before


FEATURES = {"hog", "dinov2", "siglip", "text"}
ADVERSARIAL = {"adversarial", "adaptive_weight", "discriminator", "lecam", "consistency", "logits_real", "logits_fake"}


def entries(folder):
    return [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(Path(folder) / "diffusion_pytorch_model.safetensors")


def test_a_run_with_every_loss_leaves_terms_pictures_and_curves(run_here, full_flags, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    measure = ["--validation_split", "test", "--validation_steps", "4"]
    run_here("train_maetok", *full_flags, *measure, "--output_dir", tmp_path / "run")
    log = entries(tmp_path / "run")
    common = {"loss", "reconstruction", "perceptual", "gradient_norm", *FEATURES}
    common |= {"step", "learning_rate", "mask_ratio", "seconds", "skipped_steps"}
    for entry in log[:3]:
        assert entry.keys() == common  # the discriminator begins at the fourth step
    for entry in log[3:]:
        assert entry.keys() == common | ADVERSARIAL | {"discriminator_gradient_norm"}
    assert log[-1]["loss"] is not None and all(entry["skipped_steps"] == 0 for entry in log)
    report = json.loads((tmp_path / "run" / "train_report.json").read_text())
    assert report["held_out"].keys() == {"psnr", "ssim", "lpips", "num_images"}

    pictures = sorted(path.name for path in (tmp_path / "run" / "validation").iterdir())
    assert pictures == ["step-4.png", "step-8.png"]
    assert np.array(PIL.Image.open(tmp_path / "run" / "validation" / "step-8.png")).std() > 10
    files = (tmp_path / "run" / "logs").rglob("events.out.*")
    (folder,) = {path.parent for path in files if path.parent.name == "maetok_hf"}  # beside that of the settings
    curves = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in curves.Scalars("loss")] == list(range(1, 9))
    assert [event.step for event in curves.Scalars("validation/psnr")] == [4, 8]
    assert [event.step for event in curves.Images("validation/reconstructions")] == [4, 8]

    # a tokenizer without anything of the training in it, and statistics of the weights beside them at every save
    assert all(name.startswith(("encoder.", "decoder.")) for name in weights_of(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoint-6"
    stds = [AutoencoderMAE.load_config(checkpoint / name)["latents_std"] for name in ("tokenizer", "tokenizer_ema")]
    assert stds[0] > 0 and stds[1] > 0 and stds[0] != stds[1]
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {
        "auxiliary_decoders.safetensors",
        "discriminator.safetensors",
    }
    assert "Epoch 1 of the images is over: 1 corrupt, " in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 4])
def test_stopped_before_and_after_the_discriminator_began_it_continues_exactly(
    run_here, full_flags, tmp_path, assert_same_result, step
):
    flags = [*full_flags, "--gradient_accumulation_steps", "2"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "whole")

    def send_signal(module):
        # two micro-batches a step
        module.TokenizerTraining.micro_step = signal_before(module.TokenizerTraining.micro_step, 2 * step + 1)

    with pytest.raises(SystemExit):
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "stopped", prepare=send_signal)
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "stopped")
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_without_its_discriminator_yet_the_tokenizer_is_that_of_a_run_without_one(run_here, full_flags, tmp_path):
    short = ["--max_train_steps", "4"]
    run_here("train_maetok", *full_flags, *short, "--output_dir", tmp_path / "with")
    run_here("train_maetok", *full_flags, *short, "--adversarial_weight", "0", "--output_dir", tmp_path / "without")
    one, other = (weights_of(tmp_path / name / "checkpoint-2" / "tokenizer_ema") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_mixed_resolutions_in_one_run(run_here, full_flags, tmp_path, assert_same_result):
    flags = [*full_flags, "--mixed_resolutions", "32", "48", "--mixed_resolution_weights", "1", "2"]
    sides = []

    def note_sides(module):
        inner = module.TokenizerTraining.make_inputs

        def make_inputs(self, step, batch, mask_ratio):
            sides.append(batch["images"].shape[-1])
            return inner(self, step, batch, mask_ratio)

        module.TokenizerTraining.make_inputs = make_inputs

    run_here("train_maetok", *flags, "--output_dir", tmp_path / "whole", prepare=note_sides)
    assert set(sides) == {32, 48} and len(sides) == 8
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "parts", "--max_train_steps", "8")
    assert_same_result(tmp_path / "whole", tmp_path / "parts")


def spoil_steps(steps):
    """Make the pixels of some steps NaN."""

    def prepare(module):
        inner = module.TokenizerTraining.make_inputs

        def make_inputs(self, step, batch, mask_ratio):
            inputs = inner(self, step, batch, mask_ratio)
            if step in steps:
                inputs["pixel_values"] = inputs["pixel_values"] * torch.nan
            return inputs

        module.TokenizerTraining.make_inputs = make_inputs

    return prepare


def test_steps_that_are_not_finite_are_skipped_and_counted(run_here, full_flags, tmp_path):
    run_here("train_maetok", *full_flags, "--output_dir", tmp_path / "run", prepare=spoil_steps({0, 4}))
    log = entries(tmp_path / "run")
    assert [entry["skipped_steps"] for entry in log] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert [entry["loss"] is None for entry in log] == [bool(entry["skipped_steps"]) for entry in log]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())
    discriminator = load_file(tmp_path / "run" / "checkpoint-8" / "discriminator.safetensors")
    assert all(value.isfinite().all() for value in discriminator.values())
    assert json.loads((tmp_path / "run" / "train_report.json").read_text())["skipped_steps"] == 2


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_last_good_state(run_here, full_flags, tmp_path):
    flags = [*full_flags, "--max_skipped_steps", "2", "--output_dir", tmp_path / "run"]
    with pytest.raises(FloatingPointError, match=r"At least 2 steps in a row .* checkpoint-6 has the weights from"):
        run_here("train_maetok", *flags, prepare=spoil_steps({3, 4, 5, 6}))
    newest = complete_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "checkpoint-6"
    good = complete_checkpoints(tmp_path / "run")[0]
    assert good.name == "checkpoint-4"  # after the first of the steps that were skipped
    one, other = weights_of(newest / "tokenizer"), weights_of(good / "tokenizer")
    assert all(torch.equal(one[name], other[name]) for name in one)
    run_here("train_maetok", *flags)  # whatever broke it is gone
    assert entries(tmp_path / "run")[-1]["step"] == 8


def test_a_run_is_published_with_its_card_and_picture(run_here, full_flags, tmp_path, hub):
    publish = ["--push_to_hub", "--hub_model_id", "user/squares", "--hub_private_repo", "--validation_split", "test"]
    run_here("train_maetok", *full_flags, *publish, "--output_dir", tmp_path / "run")
    repository = hub.repositories["user/squares"]
    assert repository.private
    files = repository.files
    assert (
        files["diffusion_pytorch_model.safetensors"]
        == (tmp_path / "run" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert {"config.json", "README.md", "reconstructions.png"} <= files.keys()
    card = str(check_card("user/squares"))
    assert 'AutoencoderMAE.from_pretrained("user/squares")' in card and "psnr" in card.lower()
    assert str(tmp_path) not in card


def test_a_full_hub_stops_nothing_and_gets_the_model_when_there_is_room(
    run_here, full_flags, tmp_path, hub, monkeypatch, caplog
):
    from maetok_hf.training import hub as hub_module

    monkeypatch.setattr(hub_module, "RETRY_WAITS", ())
    hub.quota = 1000
    flags = [*full_flags, "--push_to_hub", "--max_train_steps", "4", "--output_dir", tmp_path / "run"]
    run_here("train_maetok", *flags)
    (warning, *_) = [message for message in caplog.messages if "is not uploaded, training goes on" in message]
    assert QUOTA_MESSAGE in warning and "To upload it by hand: hf upload user/run " in warning
    trained = AutoencoderMAE.from_pretrained(tmp_path / "run")
    assert "diffusion_pytorch_model.safetensors" not in hub.repositories["user/run"].files
    hub.quota = None
    run_here("train_maetok", *flags)
    uploaded = AutoencoderMAE.from_pretrained("user/run")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in uploaded.state_dict().items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption_column", "words"], "`caption_column='words'` is not a column"),
        (["--dinov2_model", "nowhere/at-all"], "nowhere/at-all"),
        (["--discriminator_model", "local-dir:/nowhere"], "the trunk of the discriminator"),
        (["--resolution", "36"], "must be a multiple"),
    ],
)
def test_wrong_input_ends_the_run_before_the_first_step(run_here, full_flags, tmp_path, monkeypatch, more, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message):
        run_here("train_maetok", *full_flags, "--output_dir", tmp_path / "out", *more)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_text_target_needs_captions_and_captions_need_a_use(run_here, recipes, full_flags, base_flags, tmp_path):
    without = [word for word in full_flags if word not in ("--caption_column", "caption")]
    with pytest.raises(ValueError, match="`caption_column` names the captions"):
        run_here("train_maetok", *without, "--output_dir", tmp_path / "one")
    plain = ["--recipe", recipes["tokenizer"], *base_flags, "--caption_column", "caption"]
    with pytest.raises(ValueError, match="`caption_column` names the captions"):
        run_here("train_maetok", *plain, "--output_dir", tmp_path / "two")


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(run_here, full_flags, tmp_path):
    with pytest.raises(ValueError, match="`pip install wandb`"):
        run_here("train_maetok", *full_flags, "--report_to", "wandb", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def recording(cls, reads):
    """A subclass whose instances note which fields are read, but not by `dataclasses.asdict`."""

    class Recording(cls):
        def __getattribute__(self, name):
            if sys._getframe(1).f_globals["__name__"] != "dataclasses":
                reads.add(name)
            return super().__getattribute__(name)

    return Recording


def record_reads(module, classes, reads):
    """Let a script work with recording classes, from the moment its command line is parsed."""
    for name in classes:
        setattr(module, name, recording(getattr(module, name), reads))
    parse = module.parse_arguments

    def parse_arguments(*arguments):
        before = set(reads)
        settings = parse(*arguments)
        # what the checks of the values have read is not yet used
        reads.intersection_update(before)
        return settings

    module.parse_arguments = parse_arguments


def test_every_flag_is_read(run_here, full_flags, recipes, base_flags, tmp_path, hub):
    reads = set()
    classes = ["TokenizerRecipe", "TokenizerRunOptions"]

    def run(*arguments):
        run_here("train_maetok", *arguments, prepare=lambda module: record_reads(module, classes, reads))

    short = ["--max_train_steps", "4", "--checkpointing_steps", "10"]
    short += ["--gradient_checkpointing", "--gradient_checkpointing_share", "0.5"]
    cold = ["--lr_warmup_steps", "0"]
    measure = ["--validation_split", "test", "--validation_steps", "2"]
    run(*full_flags, *short, *cold, *measure, "--push_to_hub", "--output_dir", tmp_path / "one")
    plain = ["--recipe", recipes["tokenizer"], *base_flags, *short, *cold]
    run(*plain, "--output_dir", tmp_path / "kl", "--model", "gaussian_posterior=true")
    run(*plain, "--output_dir", tmp_path / "mixed", "--mixed_resolutions", "16", "20")
    stage_two = ["--recipe", recipes["decoder"], *base_flags, "--pretrained_model_name_or_path", tmp_path / "one"]
    run(*stage_two, *short, *cold, "--resolution", "32", "--output_dir", tmp_path / "two")
    fields = {field.name for cls in (TokenizerRecipe, TokenizerRunOptions) for field in dataclasses.fields(cls)}
    assert fields - reads == set()


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(run_here, full_flags, tmp_path):
    short = ["--max_train_steps", "4", "--model", "decoder_drop_path_rate=0.0"]
    run_here("train_maetok", *full_flags, *short, "--output_dir", tmp_path / "eager")
    short += ["--torch_compile", "--gradient_checkpointing", "--gradient_checkpointing_share", "0.5"]
    run_here("train_maetok", *full_flags, *short, "--output_dir", tmp_path / "compiled")
    for one, other in zip(entries(tmp_path / "eager"), entries(tmp_path / "compiled"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(
    launch, run_here, full_flags, tmp_path, assert_same_result, processes
):
    """Killed within a step, within a save and before its rename; on 2 processes one of them is told to stop, too."""
    flags = [*full_flags, "--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"]
    if processes == 1:
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "whole")
    else:
        whole = launch("train_maetok", *flags, "--output_dir", tmp_path / "whole", processes=processes, anew=True)
        assert whole.returncode == 0, whole.stdout

    command = ["train_maetok", *flags, "--output_dir", tmp_path / "stopped"]
    # two backward passes a step; a checkpoint every 2 steps; what is counted begins anew with every start
    faults = [
        (f"backward:8:KILL:{processes - 1}", "checkpoint-2"),  # in step 4
        ("write:1:KILL:0", "checkpoint-2"),  # in checkpoint 4, which has models but no optimiser
        ("rename:2:KILL:0", "checkpoint-4"),  # in checkpoint 6, of which all is written
    ]
    if processes == 2:
        faults.append(("backward:2:TERM:1", "checkpoint-5"))
    for fault, newest in faults:
        stopped = launch(*command, processes=processes, fault=fault)
        assert stopped.returncode != 0, stopped.stdout
        assert complete_checkpoints(tmp_path / "stopped")[-1].name == newest, stopped.stdout
        if fault.startswith("write"):
            assert list((tmp_path / "stopped").glob(".checkpoint-4.partial/tokenizer/*")), stopped.stdout
            assert not list((tmp_path / "stopped").glob(".checkpoint-4.partial/optimizer*"))
    if processes == 2:
        assert "Stopped by signal 15 after step 5" in stopped.stdout
    finished = launch(*command, processes=processes)
    assert finished.returncode == 0, finished.stdout
    assert f"beginning at step {3 + processes}" in finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("adversarial", [False, True])
def test_two_processes_equal_one_that_accumulates_and_can_continue_it(
    launch, run_here, full_flags, tmp_path, adversarial
):
    """
    The sums over images are made in another order, which Adam's first steps magnify. With the discriminator there is
    one statistic that differs: its spectral norms are estimated with a power iteration for each forward pass, of
    which an accumulating process makes two in a step. LeCam's means are those of the whole step in both, and adaptive
    weights those of a micro-batch.
    """
    flags = [*full_flags, "--num_streams", "2", "--max_train_steps", "6"]
    if not adversarial:
        flags += ["--adversarial_weight", "0"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", "2")
    two = launch("train_maetok", *flags, "--output_dir", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stdout
    for first, second in zip(entries(tmp_path / "one"), entries(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"seconds"}:
            # a ratio of norms, and norms of gradients that are nearly 0, have larger relative errors
            loose = name in ADVERSARIAL or name.endswith("gradient_norm")
            assert first[name] == pytest.approx(second[name], rel=0.05 if loose else 2e-3, abs=1e-3), name
    (epoch,) = [line for line in two.stdout.splitlines() if line.startswith("Epoch 1 of the images is over")]
    assert "1 corrupt" in epoch  # counted on one process, said on the other
    more = ["--max_train_steps", "7", "--gradient_accumulation_steps", "2", "--output_dir", tmp_path / "two"]
    with pytest.warns(UserWarning, match="recipe.max_train_steps is 7 now and was 6"):
        run_here("train_maetok", *flags, *more)
    assert [entry["step"] for entry in entries(tmp_path / "two")] == list(range(1, 8))


@pytest.mark.slow
def test_a_run_that_fails_ends_with_its_data_workers(launch, recipes, base_flags, tmp_path):
    flags = ["--recipe", recipes["tokenizer"], *base_flags, "--dataloader_num_workers", "2"]
    failed = launch("train_maetok", *flags, "--output_dir", tmp_path / "run", fault="backward:3:FAIL:0", anew=True)
    assert failed.returncode == 1 and "RuntimeError: a fault for this test" in failed.stdout
    assert "DataLoader worker" not in failed.stdout


def test_what_a_run_was_killed_before_is_made_up_for(run_here, full_flags, tmp_path):
    """The checkpoint comes first; statistics of its latents, measurements and pictures of its step come after it."""
    command = ["train_maetok", *full_flags, "--max_train_steps", "6", "--output_dir", tmp_path / "run"]
    command += ["--validation_split", "test", "--validation_steps", "2"]

    def fail(module):
        def measure_latents(self, done):
            raise RuntimeError("a fault for this test")

        module.TokenizerTraining.measure_latents = measure_latents

    def statistics_of(step):
        return AutoencoderMAE.load_config(tmp_path / "run" / f"checkpoint-{step}" / "tokenizer_ema")["latents_std"]

    with pytest.raises(RuntimeError, match="a fault for this test"):
        run_here(*command, prepare=fail)
    assert statistics_of(2) is None and not (tmp_path / "run" / "validation").exists()
    run_here(*command, "--checkpoints_total_limit", "5")
    assert all(statistics_of(step) is not None for step in (2, 4, 6))
    pictures = sorted(path.name for path in (tmp_path / "run" / "validation").iterdir())
    assert pictures == ["step-2.png", "step-4.png", "step-6.png"]


def test_a_run_continues_from_a_checkpoint_of_another_folder(run_here, full_flags, tmp_path, assert_same_result):
    flags = [*full_flags, "--max_train_steps", "6", "--checkpoints_total_limit", "5"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one")
    given = ["--resume_from_checkpoint", tmp_path / "one" / "checkpoint-4"]
    run_here("train_maetok", *flags, *given, "--output_dir", tmp_path / "other")
    assert weights_of(tmp_path / "one").keys() == weights_of(tmp_path / "other").keys()
    for name, value in weights_of(tmp_path / "one").items():
        assert torch.equal(value, weights_of(tmp_path / "other")[name])


def test_held_out_images_that_cannot_be_used_do_not_end_the_run(run_here, recipes, data_folder, tmp_path, caplog):
    from datasets import Dataset, Features, Image

    (tmp_path / "data").mkdir()
    for path in data_folder.glob("train-*.parquet"):
        (tmp_path / "data" / path.name).symlink_to(path)
    broken = Dataset.from_dict({"image": [{"bytes": b"broken", "path": None}] * 3}, Features({"image": Image()}))
    broken.to_parquet(tmp_path / "data" / "test-0.parquet")
    flags = ["--recipe", recipes["tokenizer"], "--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache"]
    flags += ["--validation_split", "test", "--validation_steps", "2", "--max_train_steps", "4"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "train_report.json").read_text())["held_out"] is None
    assert "Held-out images after step 2: not one can be used" in caplog.text


def test_what_a_short_run_does_not_do_is_said(run_here, recipes, base_flags, tmp_path, caplog, capsys):
    flags = ["--recipe", recipes["tokenizer"], *base_flags, "--max_train_steps", "2", "--lr_warmup_steps", "0"]
    flags += ["--validation_split", "test", "--validation_steps", "2", "--num_validation_images", "7"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "run")
    assert "`validation_steps` = 2 has no effect: the run has 2 steps" in caplog.text
    assert "`num_validation_images` is 7, but " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "train_report.json").read_text())["held_out"]["num_images"] == 6


@pytest.mark.parametrize("script", ["train_maetok", "train_sit"])
def test_odd_images_are_reported_wherever_a_run_ends(
    script, run_here, recipes, odd_folder, tokenizer_folder, tmp_path, capsys
):
    """2 steps of 8 images are an epoch of the 20: a run of 3 steps ends within its second one."""
    recipe = recipes["tokenizer" if script == "train_maetok" else "sit"]
    flags = ["--recipe", recipe, "--dataset_name", odd_folder, "--cache_dir", tmp_path / "cache"]
    flags += [] if script == "train_maetok" else ["--tokenizer_name_or_path", tokenizer_folder]
    flags += ["--max_train_steps", "3", "--lr_warmup_steps", "0"]

    def stop_after_a_step(module):
        (training,) = [value for name, value in vars(module).items() if name.endswith("Training")]
        training.micro_step = signal_before(training.micro_step, 1)

    def reported(start):
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]
        return sum(int(number) for number in re.findall(r"(\d+) (?:grayscale|cmyk)", line))

    run_here(script, *flags, "--output_dir", tmp_path / "whole")
    assert reported("The run ends in epoch 2") == 8
    with pytest.raises(SystemExit):
        run_here(script, *flags, "--output_dir", tmp_path / "stopped", prepare=stop_after_a_step)
    assert reported("The run ends in epoch 1") == 8
    run_here(script, *flags, "--output_dir", tmp_path / "stopped")
    assert reported("Epoch 1 ") == 16, "what was counted before the stop is in the report of the epoch"
    reports = [json.loads((tmp_path / name / "train_report.json").read_text()) for name in ("whole", "stopped")]
    assert reports[0]["row_counts"] == reports[1]["row_counts"]
    assert reports[0]["row_counts"].keys() == {"grayscale", "cmyk"} and sum(reports[0]["row_counts"].values()) == 24


def test_a_run_cannot_end_before_the_step_it_is_at(run_here, recipes, base_flags, tmp_path):
    command = ["train_maetok", "--recipe", recipes["tokenizer"], *base_flags, "--output_dir", tmp_path / "run"]
    run_here(*command, "--max_train_steps", "4")
    with pytest.raises(ValueError, match="`max_train_steps` is 3, but the run is at step 4 already"):
        run_here(*command, "--max_train_steps", "3")


def test_launcher_may_not_accumulate_behind_the_scripts_back(run_here, recipes, base_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    command = ["train_maetok", "--recipe", recipes["tokenizer"], *base_flags, "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 2 in the script and 4 in the launcher"):
        run_here(*command, "--gradient_accumulation_steps", "2")


def test_statistics_that_are_not_measured_cannot_be_configured(run_here, recipes, base_flags, tmp_path):
    run_here("train_maetok", "--recipe", recipes["tokenizer"], *base_flags, "--output_dir", tmp_path / "one")
    given = ["--pretrained_model_name_or_path", tmp_path / "one", "--output_dir", tmp_path / "two"]
    for flag, value in (("checkpoint_statistics_images", "8"), ("latent_statistics", "channel")):
        with pytest.raises(ValueError, match=f"`{flag}` has no effect"):
            run_here("train_maetok", "--recipe", recipes["decoder"], *base_flags, *given, f"--{flag}", value)


def test_nothing_that_is_exported_names_a_folder_of_this_machine(run_here, recipes, base_flags, tmp_path):
    run_here("train_maetok", "--recipe", recipes["tokenizer"], *base_flags, "--output_dir", tmp_path / "one")
    given = ["--pretrained_model_name_or_path", tmp_path / "one", "--output_dir", tmp_path / "two"]
    run_here("train_maetok", "--recipe", recipes["decoder"], *base_flags, *given)
    for folder in ("one", "two"):
        for name in ("config.json", "README.md"):
            assert str(tmp_path) not in (tmp_path / folder / name).read_text()
