"""Saving, loading, moving and offloading: the pipeline as any other of diffusers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

from maetok_hf import MAETokDiffusionPipeline
from tests.loopback_hub import serve_folder
from tests.pipelines.helpers import SCHEDULERS, generator, tiny_pipeline


NAMES = {0: "tench, Tinca tinca", 9: "goldfish"}


def run(pipe) -> np.ndarray:
    return pipe([3, 5], num_inference_steps=2, generator=generator(), output_type="np").images


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline("sde", id2label=NAMES).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("loader", [MAETokDiffusionPipeline, DiffusionPipeline])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_reloaded_pipeline_gives_the_same_images(loader, name, tmp_path):
    pipe = tiny_pipeline(name, id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is MAETokDiffusionPipeline
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert not loaded.vae.training and not loaded.transformer.training
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(run(loaded), run(pipe))


def test_the_index_names_the_library_and_no_inner_module(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "MAETokDiffusionPipeline"
    assert index["vae"] == ["maetok_hf", "AutoencoderMAE"]
    assert index["transformer"] == ["maetok_hf", "SiTTransformer1DModel"]
    assert index["scheduler"] == ["maetok_hf", "FlowMatchEulerMaruyamaScheduler"]


def test_diffusers_own_schedulers_stay_its_own(tmp_path):
    tiny_pipeline("euler").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_class_names_survive(folder):
    loaded = MAETokDiffusionPipeline.from_pretrained(folder)
    assert loaded.config.id2label == loaded.id2label == NAMES
    assert loaded.get_label_ids(["Tinca tinca", "goldfish"]) == [0, 9]
    # and a second round
    loaded.save_pretrained(folder)
    assert DiffusionPipeline.from_pretrained(folder).labels == loaded.labels


def test_a_thousand_class_names_survive(tmp_path):
    names = {index: f"class {index}" for index in range(1000)}
    tiny_pipeline(id2label=names, transformer={"num_classes": 1000}).save_pretrained(tmp_path)
    assert MAETokDiffusionPipeline.from_pretrained(tmp_path).config.id2label == names


def test_variants_and_dtypes(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    for part in ("vae", "transformer"):
        assert (tmp_path / part / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = MAETokDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.vae.dtype == loaded.transformer.dtype == loaded.dtype == torch.float16
    mixed = MAETokDiffusionPipeline.from_pretrained(
        tmp_path, variant="fp16", dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    assert (mixed.vae.dtype, mixed.transformer.dtype) == (torch.float32, torch.bfloat16)
    for model in (loaded, mixed):
        model.set_progress_bar_config(disable=True)
        assert np.abs(run(model) - run(pipe)).max() < 0.1
    with pytest.raises((OSError, ValueError), match="no_such_variant"):
        MAETokDiffusionPipeline.from_pretrained(tmp_path, variant="no_such_variant")


def test_components_can_be_replaced_when_loading(folder):
    scheduler = FlowMatchEulerDiscreteScheduler()
    transformer = tiny_pipeline(transformer={"num_classes": 12}).transformer
    loaded = DiffusionPipeline.from_pretrained(folder, scheduler=scheduler, transformer=transformer)
    assert loaded.scheduler is scheduler and loaded.transformer is transformer


def test_components_and_from_pipe():
    pipe = tiny_pipeline("sde", id2label=NAMES)
    assert set(pipe.components) == {"vae", "transformer", "scheduler", "guidance_transformer"}
    other = MAETokDiffusionPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    assert other.transformer is pipe.transformer and other.vae is pipe.vae
    assert other.config.id2label == NAMES
    assert isinstance(other.scheduler, FlowMatchEulerDiscreteScheduler)
    rebuilt = MAETokDiffusionPipeline(**pipe.components, id2label=pipe.config.id2label)
    rebuilt.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(run(rebuilt), run(pipe))


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_maps(folder, device_map):
    loaded = MAETokDiffusionPipeline.from_pretrained(folder, device_map=device_map)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(run(loaded), run(tiny_pipeline("sde")), atol=1e-5)


def test_casting_casts_both_models():
    pipe = tiny_pipeline().to(torch.float16)
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.float16


# Offloading, with the CPU in the accelerator's place


def test_model_offload_brings_each_model_up_when_it_is_its_turn(monkeypatch):
    pipe = tiny_pipeline("sde")
    expected = run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in pipe._all_hooks] == [pipe.transformer, pipe.vae]
    events = []
    for name in ("transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        assert isinstance(hook, CpuOffload)
        pre_forward = hook.pre_forward

        def record(module, *args, name=name, pre_forward=pre_forward, **kwargs):
            events.append(name)
            return pre_forward(module, *args, **kwargs)

        monkeypatch.setattr(hook, "pre_forward", record)
    np.testing.assert_array_equal(run(pipe), expected)
    # the decoder is entered by `decode`, not by `forward`, and its hook still runs
    assert events[0] == "transformer" and events[-1] == "vae" and events.count("vae") == 1


def test_sequential_offload_leaves_nothing_in_memory(tmp_path):
    pipe = tiny_pipeline("sde")
    expected = run(pipe)
    for name in ("vae", "transformer"):
        # as `enable_sequential_cpu_offload`, which cannot tell a CPU accelerator's copies from the originals
        disk_offload(getattr(pipe, name), str(tmp_path / name), execution_device=torch.device("cpu"))
    for model in (pipe.vae, pipe.transformer):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for _ in range(2):
        np.testing.assert_allclose(run(pipe), expected, atol=1e-6)
    for model in (pipe.vae, pipe.transformer):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(settings):
    pipe = tiny_pipeline("sde")
    expected = run(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **settings)
    np.testing.assert_allclose(run(pipe), expected, atol=1e-6)


# Other processes and the Hub


LOAD_AND_SAMPLE = """
import sys
import torch
import maetok_hf
from diffusers import DiffusionPipeline
for loader in (DiffusionPipeline, maetok_hf.MAETokDiffusionPipeline):
    pipe = loader.from_pretrained(sys.argv[1])
    pipe.set_progress_bar_config(disable=True)
    latents = pipe("goldfish", num_inference_steps=2, generator=torch.manual_seed(0), output_type="latent").images
    print(type(pipe).__name__, *(f"{value:.4f}" for value in latents.flatten().tolist()))
"""


def load_and_sample(source: str, **environment: str) -> list[str]:
    """In a fresh process, with both loaders."""
    command = [sys.executable, "-c", LOAD_AND_SAMPLE, source]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def expected_samples() -> list[str]:
    pipe = tiny_pipeline("sde", id2label=NAMES)
    latents = pipe("goldfish", num_inference_steps=2, generator=generator(), output_type="latent").images
    line = " ".join(["MAETokDiffusionPipeline", *(f"{value:.4f}" for value in latents.flatten().tolist())])
    return [line, line]


def test_importing_the_library_is_all_that_a_fresh_process_needs(folder):
    assert load_and_sample(str(folder)) == expected_samples()


def test_the_hub_client_recognises_the_components(folder):
    """What `from_pretrained(repo_id)` asks of an index before it downloads anything."""
    index = json.loads((folder / "model_index.json").read_text())
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    custom, folders = _get_custom_components_and_folders("user/repo", index, files)
    assert custom == {} and {"vae", "transformer", "scheduler"} <= set(folders)


@pytest.mark.slow
def test_loading_from_the_hub(folder, tmp_path):
    with serve_folder(folder, "user/pipeline") as endpoint:
        samples = load_and_sample(
            "user/pipeline",
            HF_ENDPOINT=endpoint,
            HF_HOME=str(tmp_path / "cache"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
    assert samples == expected_samples()
