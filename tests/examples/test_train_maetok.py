"""`train_maetok.py`: what it leaves behind, and that interruptions leave no trace in it."""

import ast
import dataclasses
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


EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_PROCESS_WITH_WORKERS = ["--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"]
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
    assert {"loss", "reconstruction", "hog", "gradient_norm", "learning_rate", "mask_ratio", "seconds"} <= log[0].keys()
    assert all(0.4 <= entry["mask_ratio"] <= 0.6 for entry in log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert sum(entry["replaced_fraction"] for entry in log) > 0
    report = json.loads((tmp_path / "one" / "train_report.json").read_text())
    assert report["num_threads"] == torch.get_num_threads()
    assert report["final"] == log[-1]
    assert report["training_seconds"] > 0
    assert 0 < report["held_out_psnr"] < 60
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
    assert ratios == pytest.approx([0.6, 0.45, 0.3, 0.15, 0, 0, 0, 0])
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
        draw = module.mask_ratio_at

        def mask_ratio_at(number, recipe, seed):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(number, recipe, seed)

        module.mask_ratio_at = mask_ratio_at

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


def test_every_flag_is_read(run_here, flags, recipes, base_flags, tmp_path):
    reads = set()
    classes = ["TokenizerRecipe", "TokenizerRunOptions"]

    def run(*arguments):
        run_here("train_maetok", *arguments, prepare=lambda module: record_reads(module, classes, reads))

    short = ["--max_train_steps", "3"]  # one of them is neither the last nor a checkpoint
    cold = ["--lr_warmup_steps", "0"]
    run(*flags, *short, *cold, "--output_dir", tmp_path / "one", "--validation_split", "test")
    run(*flags, *short, *cold, "--output_dir", tmp_path / "kl", "--model", "gaussian_posterior=true")
    stage_two = ["--recipe", recipes["decoder"], *base_flags, "--pretrained_model_name_or_path", tmp_path / "one"]
    run(*stage_two, *short, *cold, "--output_dir", tmp_path / "two")

    from maetok_hf.training.recipes import TokenizerRecipe
    from maetok_hf.training.run_options import TokenizerRunOptions

    fields = {field.name for cls in (TokenizerRecipe, TokenizerRunOptions) for field in dataclasses.fields(cls)}
    assert fields - reads == set()


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
    from maetok_hf.training import run_options

    kind = "Tokenizer" if "maetok" in script.stem else "SiT"
    text = ast.get_docstring(ast.parse(script.read_text())).replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.strip().startswith("accelerate launch")]
    assert commands
    for command in commands:
        words = command[command.index(f"examples/{script.name}") + 1 :]
        parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
        recipes_module.parse_arguments(
            parser,
            getattr(recipes_module, f"{kind}Recipe"),
            getattr(run_options, f"{kind}RunOptions"),
            EXAMPLES / "recipes",
            words,
        )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_in_a_step_and_in_a_save_equals_the_uninterrupted_one(
    launch, flags, tmp_path, assert_same_result, processes
):
    if processes == 1:
        flags = [*flags, *ONE_PROCESS_WITH_WORKERS]
    else:
        flags = [*flags, "--dataloader_num_workers", "1", "--gradient_accumulation_steps", "2"]
    whole = launch("train_maetok", *flags, "--output_dir", tmp_path / "whole", processes=processes)
    assert whole.returncode == 0, whole.stdout

    command = ["train_maetok", *flags, "--output_dir", tmp_path / "killed"]
    last = processes - 1
    # 2 micro-batches a step: dies between the two of step 4, with checkpoint 2 on the disk
    killed = launch(*command, processes=processes, fault=f"backward:8:KILL:{last}")
    assert killed.returncode != 0
    assert [path.name for path in complete_checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    # process 0 calls torch.save twice per checkpoint: dies when checkpoint 4 has models but no optimiser
    killed = launch(*command, processes=processes, fault="write:1:KILL:0")
    assert killed.returncode != 0
    assert [path.name for path in complete_checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    assert list((tmp_path / "killed").glob(".checkpoint-4.partial/*"))
    # checkpoint 4 is saved, checkpoint 6 dies before its rename
    killed = launch(*command, processes=processes, fault="rename:2:KILL:0")
    assert killed.returncode != 0
    assert [path.name for path in complete_checkpoints(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-4"]
    finished = launch(*command, processes=processes)
    assert finished.returncode == 0, finished.stdout
    assert "beginning at step 4" in finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*.partial"))


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_the_same_command_continues(launch, flags, tmp_path, assert_same_result):
    whole = launch("train_maetok", *flags, "--output_dir", tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stdout
    command = ["train_maetok", *flags, "--output_dir", tmp_path / "stopped"]
    stopped = launch(*command, processes=2, fault="backward:3:TERM:1")
    assert stopped.returncode != 0
    assert "Stopped by signal 15 after step 3" in stopped.stdout
    assert complete_checkpoints(tmp_path / "stopped")[-1].name == "checkpoint-3"
    finished = launch(*command, processes=2)
    assert finished.returncode == 0, finished.stdout
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["group", "launcher"])
def test_signal_from_outside_stops_a_launched_run_with_data_workers(launch, flags, tmp_path, request, whom):
    conftest = sys.modules[launch.__module__]
    flags = [*flags, *ONE_PROCESS_WITH_WORKERS, "--max_train_steps", "100000", "--checkpointing_steps", "100000"]
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
