"""`train_maetok.py`: what it leaves behind, and that interruptions leave no trace in it."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.training.checkpointing import complete_checkpoints
from maetok_hf.training.interruption import RunLock
from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions
from maetok_hf.training.run_options import SiTRunOptions, TokenizerRunOptions
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from tests.testing_utils import signal_before


EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = ["--checkpointing_steps", "2"]


def entries(folder):
    return [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture
def flags(recipes, base_flags):
    return ["--recipe", recipes["tokenizer"], *base_flags, *CHECKPOINTS]


def test_both_stages_leave_a_tokenizer_with_statistics_and_a_report(run_here, flags, recipes, base_flags, tmp_path):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", "--validation_split", "test")
    tokenizer = AutoencoderMAE.from_pretrained(tmp_path / "one")
    average = AutoencoderMAE.from_pretrained(tmp_path / "one" / "checkpoint-8" / "tokenizer_ema")
    online = AutoencoderMAE.from_pretrained(tmp_path / "one" / "checkpoint-8" / "tokenizer")
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    assert not torch.equal(tokenizer.decoder.proj_out.weight, online.decoder.proj_out.weight)
    assert tokenizer.config.latents_std > 0
    assert [path.name for path in complete_checkpoints(tmp_path / "one")] == ["checkpoint-6", "checkpoint-8"]
    log = entries(tmp_path / "one")
    assert [entry["step"] for entry in log] == list(range(1, 9))
    terms = {"loss", "reconstruction", "hog", "gradient_norm", "skipped_steps"}
    assert log[0].keys() == terms | {"step", "learning_rate", "mask_ratio", "seconds"}
    assert all(0.4 <= entry["mask_ratio"] <= 0.6 for entry in log)
    assert log[-1]["loss"] < log[0]["loss"]
    report = json.loads((tmp_path / "one" / "train_report.json").read_text())
    assert report["num_threads"] == torch.get_num_threads()
    assert report["final"] == log[-1]
    assert report["training_seconds"] > 0
    assert 0 < report["held_out"]["psnr"] < 60 and report["held_out"]["num_images"] == 6
    assert report["latents_std"] == tokenizer.config.latents_std

    stage_two = ["--recipe", recipes["decoder"], *base_flags, "--pretrained_model_name_or_path", tmp_path / "one"]
    run_here("train_maetok", *stage_two, "--output_dir", tmp_path / "two")
    finetuned = AutoencoderMAE.from_pretrained(tmp_path / "two")
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(finetuned.encode(images).latent, tokenizer.encode(images).latent)
    assert not torch.equal(finetuned.decoder.proj_out.weight, tokenizer.decoder.proj_out.weight)
    assert (finetuned.config.latents_mean, finetuned.config.latents_std) == (
        tokenizer.config.latents_mean,
        tokenizer.config.latents_std,
    )
    ratios = [entry["mask_ratio"] for entry in entries(tmp_path / "two")]
    assert ratios == pytest.approx([0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert "hog" not in entries(tmp_path / "two")[0]


def test_finished_run_exports_the_same_result_again(run_here, flags, tmp_path, assert_same_result):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one")
    before = (tmp_path / "one" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "one" / "config.json").unlink()
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one")
    assert (tmp_path / "one" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    AutoencoderMAE.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("step", [1, 5])
def test_signal_saves_a_checkpoint_and_the_same_command_continues(
    run_here, flags, tmp_path, assert_same_result, step, capsys
):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "whole")
    command = ["train_maetok", *flags, "--output_dir", tmp_path / "stopped"]

    def send_signal_in_step(module):
        module.TokenizerTraining.micro_step = signal_before(module.TokenizerTraining.micro_step, step + 1)

    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=send_signal_in_step)
    assert caught.value.code == 128 + signal.SIGTERM
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == f"checkpoint-{step + 1}"
    assert f"Stopped by signal 15 after step {step + 1}" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "config.json").exists()
    run_here(*command)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_micro_batches_do_not_change_the_data_or_the_masks(run_here, flags, tmp_path):
    """Accumulation sums the same images with the same masks; the sums differ by rounding only."""
    flags = [*flags, "--max_train_steps", "3", "--model", "decoder_drop_path_rate=0.0", "--num_streams", "1"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", "--crop", "center")
    parts = ["--gradient_accumulation_steps", "2"]
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "two", *parts)
    one, two = entries(tmp_path / "one"), entries(tmp_path / "two")
    assert [entry["mask_ratio"] for entry in one] == [entry["mask_ratio"] for entry in two]
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)


def test_gradient_checkpointing_of_any_share_changes_nothing(run_here, flags, tmp_path, assert_same_result):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one")
    command = ["train_maetok", *flags, "--output_dir", tmp_path / "two", "--gradient_checkpointing"]

    def stop_after_two_steps(module):
        module.TokenizerTraining.micro_step = signal_before(module.TokenizerTraining.micro_step, 2)

    with pytest.raises(SystemExit):
        run_here(*command, prepare=stop_after_two_steps)
    # another share does not make another run
    run_here(*command, "--gradient_checkpointing_share", "0.5")
    report = json.loads((tmp_path / "two" / "train_report.json").read_text())
    assert report["options"]["gradient_checkpointing_share"] == 0.5
    assert_same_result(tmp_path / "one", tmp_path / "two")


def test_mixed_precision_keeps_the_weights_in_float32(run_here, flags, tmp_path):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one")
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "bf16", "--mixed_precision", "bf16")
    tokenizer = AutoencoderMAE.from_pretrained(tmp_path / "bf16")
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    plain, mixed = entries(tmp_path / "one")[-1]["loss"], entries(tmp_path / "bf16")[-1]["loss"]
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.05)
    with pytest.raises(ValueError, match="mixed_precision: 'bf16' there, 'no' now"):
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "bf16")


def test_other_settings_do_not_continue_a_run(run_here, flags, tmp_path):
    run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", "--max_train_steps", "3")
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 now"):
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", "--max_train_steps", "3", "--seed", "1")
    with pytest.raises(ValueError, match=r"recipe.hog_weight: 1.0 there, 0.5 now"):
        changed = ["--max_train_steps", "3", "--hog_weight", "0.5"]
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "one", *changed)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--total_batch_size", "64"], "fewer than one global batch of 64"),
        (["--gradient_accumulation_steps", "3"], "`total_batch_size` = 8 must be a multiple of"),
        (["--pretrained_model_name_or_path", "x"], "the recipe's `stage` is 'mask_modelling'"),
        (["--train_split", "training"], "`split='training'` is not a split"),
        (["--image_column", "picture"], "`image_column='picture'` is not a column"),
    ],
)
def test_wrong_input_ends_the_run_before_the_first_step(run_here, flags, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run_here("train_maetok", *flags, "--output_dir", tmp_path / "out", *more)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_decoder_finetuning_needs_a_tokenizer(run_here, recipes, base_flags, tmp_path):
    with pytest.raises(ValueError, match="names the tokenizer that stage 'decoder_finetuning' starts from"):
        run_here("train_maetok", "--recipe", recipes["decoder"], *base_flags, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("train_*.py")), ids=lambda path: path.stem)
def test_main_is_short_enough_to_be_read(script):
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions}
    assert "main" in lengths
    assert max(lengths.values()) < 200


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("train_*.py")), ids=lambda path: path.stem)
def test_commands_in_the_docstring_name_real_recipes_and_flags(script):
    import argparse

    from maetok_hf.training import recipes as recipes_module

    classes = {
        "train_maetok": (TokenizerRecipe, TokenizerRunOptions),
        "train_sit": (SiTRecipe, SiTRunOptions),
        "train_sit_lora": (LoraRecipe, LoraRunOptions),
    }
    text = ast.get_docstring(ast.parse(script.read_text())).replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.strip().startswith("accelerate launch")]
    assert commands
    for command in commands:
        words = command[command.index(f"examples/{script.name}") + 1 :]
        parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
        recipes_module.parse_arguments(parser, *classes[script.stem], EXAMPLES / "recipes", words)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["group", "launcher"])
def test_signal_from_outside_stops_a_launched_run_with_data_workers(launch, flags, tmp_path, whom):
    conftest = sys.modules[launch.__module__]
    flags = [*flags, "--dataloader_num_workers", "2"]
    flags += ["--max_train_steps", "100000", "--checkpointing_steps", "100000"]
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        conftest.launch_command("train_maetok", *flags, "--output_dir", folder),
        env=conftest.launch_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (folder / "training_log.jsonl").is_file() or len(entries(folder)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        if whom == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        RunLock(folder, patience=60.0).release()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = complete_checkpoints(folder)
    step = int(checkpoint.name.split("-")[1])
    assert entries(folder)[-1]["step"] == step
    assert not (folder / "config.json").exists()
