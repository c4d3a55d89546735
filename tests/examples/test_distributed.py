"""The configurations for `accelerate launch`, and the full recipe sharded over two processes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel
from maetok_hf.training.checkpointing import complete_checkpoints


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"


@pytest.fixture
def launch_sharded(launch, copies):
    """Like `launch`, with the FSDP2 configuration, on two processes."""
    conftest = sys.modules[launch.__module__]

    def run(name, *flags, fault=None):
        script = [Path(__file__).parent / "sharded_launch.py"]
        script += [conftest.FAULTY_LAUNCH, fault] if fault is not None else []
        settings = ["--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", 2, "--main_process_port", 0]
        settings += ["--num_cpu_threads_per_process", 1, "--mixed_precision", "no"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings, *script]
        command += [conftest.EXAMPLES / f"{name}.py", *flags]
        return copies.run(command, env=conftest.launch_environment())

    return run


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_knows_every_setting_of_a_configuration(path):
    options = {action.dest for action in launch_command_parser()._actions}
    config = load_config_from_file(str(path))  # refuses unknown settings, but not within its sections
    assert not (config.fsdp_config.keys() | config.deepspeed_config.keys()) - options
    assert config.num_processes % config.num_machines == 0


def test_sharding_wraps_the_blocks_that_the_models_are_made_of():
    settings = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2
    for model in (AutoencoderMAE, SiTTransformer1DModel):
        assert model._no_split_modules == [settings["fsdp_transformer_layer_cls_to_wrap"]]


def test_deepspeed_keeps_whole_weights_in_float32():
    config = load_config_from_file(str(CONFIGS / "deepspeed_zero2.yaml"))
    settings = json.loads((CONFIGS.parents[1] / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert config.mixed_precision is None
    assert settings["zero_optimization"]["stage"] == 2
    assert not settings.keys() & {"bf16", "fp16"}
    assert settings["torch_autocast"]["enabled"]


@pytest.mark.slow
def test_sharded_run_that_is_killed_and_resumed_equals_a_replicated_one(
    launch, launch_sharded, full_flags, tmp_path, result_of
):
    flags = [*full_flags, "--max_train_steps", "5", "--gradient_accumulation_steps", "2"]
    replicated = launch("train_maetok", *flags, "--output_dir", tmp_path / "replicated", processes=2)
    assert replicated.returncode == 0, replicated.stdout

    command = ["train_maetok", *flags, "--output_dir", tmp_path / "sharded"]
    killed = launch_sharded(*command, fault="backward:9:KILL:1")  # on one process, in step 5
    assert killed.returncode != 0, killed.stdout
    assert complete_checkpoints(tmp_path / "sharded")[-1].name == "checkpoint-4", killed.stdout
    finished = launch_sharded(*command)
    assert finished.returncode == 0, finished.stdout
    assert "beginning at step 4" in finished.stdout

    one, other = result_of(tmp_path / "replicated"), result_of(tmp_path / "sharded")
    assert one.keys() == other.keys()
    assert {"adversarial", "perceptual", "discriminator_gradient_norm"} <= one["log"][-1].keys()
    for entry, sharded in zip(one["log"], other["log"], strict=True):
        assert sharded == pytest.approx(entry, rel=2e-3)  # rounding, which Adam magnifies from step to step
    # Not weight by weight: where a gradient is 0, as of biases of keys, Adam makes whole steps of rounding errors.
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for folder in (".", "checkpoint-5/tokenizer", "checkpoint-5/tokenizer_ema"):
        tokenizers = [AutoencoderMAE.from_pretrained(tmp_path / run / folder) for run in ("replicated", "sharded")]
        with torch.no_grad():
            expected, got = (tokenizer(images).sample for tokenizer in tokenizers)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
        assert tokenizers[1].config.latents_std == pytest.approx(tokenizers[0].config.latents_std, rel=1e-3)


@pytest.mark.slow
def test_sharded_generator_equals_a_replicated_one(launch, launch_sharded, flags_of, tmp_path, result_of):
    """With both passes of training without guidance, the direction term, and a stop in between."""
    flags = [*flags_of("cached"), "--guidance_free", "true", "--direction_weight", "1.0", "--validation_steps", "2"]
    replicated = launch(
        "train_sit", *flags, "--max_train_steps", "4", "--output_dir", tmp_path / "replicated", processes=2
    )
    assert replicated.returncode == 0, replicated.stdout
    for steps in ("2", "4"):
        command = ["train_sit", *flags, "--max_train_steps", steps, "--output_dir", tmp_path / "sharded"]
        finished = launch_sharded(*command)
        assert finished.returncode == 0, finished.stdout
    one, other = result_of(tmp_path / "replicated"), result_of(tmp_path / "sharded")
    assert one.keys() == other.keys()
    for entry, sharded in zip(one["log"], other["log"], strict=True):
        assert sharded == pytest.approx(entry, rel=2e-3)
