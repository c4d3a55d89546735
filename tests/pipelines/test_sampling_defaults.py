"""Steps and guidance that a pipeline keeps in its config, for calls that give none."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging

from maetok_hf import MAETokDiffusionPipeline
from maetok_hf.sampling.options import GenerateOptions
from maetok_hf.sampling.protocol import resolve_sampling
from tests.pipelines.helpers import Passes, generator, tiny_pipeline
from tests.testing_utils import tiny_autoencoder, tiny_transformer


DEFAULTS = {
    "default_num_inference_steps": 4,
    "default_guidance_scale": 1.5,
    "default_guidance_interval": [0.0, 0.7],
}


def pipeline_with(**defaults) -> MAETokDiffusionPipeline:
    pipe = MAETokDiffusionPipeline(
        tiny_autoencoder(), tiny_transformer(), FlowMatchEulerDiscreteScheduler(), **(DEFAULTS | defaults)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **arguments) -> torch.Tensor:
    return pipe(3, generator=generator(), output_type="latent", **arguments).images


def test_a_call_that_gives_none_uses_those_of_the_config():
    pipe = pipeline_with()
    expected = latents(tiny_pipeline(), num_inference_steps=4, guidance_scale=1.5, guidance_interval=(0.0, 0.7))
    assert torch.equal(latents(pipe), expected)
    passes = Passes(pipe)
    pipe(3, output_type="latent")
    assert passes.times == [1.0, 0.75, 0.5, 0.5, 0.25, 0.25] and passes.guided_times == [0.5, 0.25]
    assert pipe.guidance_scale == 1.5


@pytest.mark.parametrize(
    "argument", [{"num_inference_steps": 2}, {"guidance_scale": 1.0}, {"guidance_interval": (0.6, 0.8)}]
)
def test_what_a_call_gives_wins(argument):
    explicit = {"num_inference_steps": 4, "guidance_scale": 1.5, "guidance_interval": (0.0, 0.7)} | argument
    given = latents(pipeline_with(), **argument)
    assert torch.equal(given, latents(tiny_pipeline(), **explicit))
    assert not torch.equal(given, latents(pipeline_with()))


@pytest.mark.parametrize("loader", [MAETokDiffusionPipeline, DiffusionPipeline])
def test_they_are_saved_and_loaded_without_a_warning(loader, tmp_path, caplog):
    pipe = pipeline_with()
    pipe.save_pretrained(tmp_path)
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded = loader.from_pretrained(tmp_path)
            loader.from_pretrained(tmp_path, default_guidance_interval=(0.0, 1.0), default_guidance_scale=2)
            assert not caplog.records
            loader.from_pretrained(tmp_path, default_num_inference_steps=np.int64(5))  # diffusers notices other types
        assert "default_num_inference_steps" in caplog.text
    finally:
        diffusers_logging.disable_propagation()
    assert {name: loaded.config[name] for name in DEFAULTS} == DEFAULTS
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), latents(pipe))
    other = loader.from_pretrained(tmp_path, default_guidance_scale=1.0)
    assert dict(other.config) == dict(loaded.config) | {"default_guidance_scale": 1.0}
    copy = MAETokDiffusionPipeline.from_pipe(loaded)
    assert {name: copy.config[name] for name in DEFAULTS} == DEFAULTS


def test_pipelines_that_were_saved_without_them_have_the_published_ones(tmp_path):
    pipeline_with().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k not in DEFAULTS}))
    config = MAETokDiffusionPipeline.from_pretrained(tmp_path).config
    assert config.default_num_inference_steps == 250
    assert (config.default_guidance_scale, config.default_guidance_interval) == (1.9, [0.0, 0.75])


def test_sets_of_images_are_sampled_with_them_too(tmp_path):
    options = {"pretrained_model_name_or_path": "x", "output_dir": "y"}
    expected = {
        "num_inference_steps": 4,
        "guidance_method": "cfg",
        "guidance_scale": 1.5,
        "guidance_interval": (0.0, 0.7),
    }
    assert resolve_sampling(GenerateOptions(**options), pipeline_with(), [0, 1]) == expected
    given = {"num_inference_steps": 3, "guidance_interval": [0.1, 0.2], "guidance_scale": 2.0}
    resolved = resolve_sampling(GenerateOptions(**options, **given), pipeline_with(), [0, 1])
    assert resolved == expected | given | {"guidance_interval": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_num_inference_steps", 0),
        ("default_num_inference_steps", 2.5),
        ("default_num_inference_steps", True),
        ("default_guidance_scale", -1.0),
        ("default_guidance_scale", float("nan")),
        ("default_guidance_scale", "1.5"),
        ("default_guidance_interval", [0.7, 0.1]),
        ("default_guidance_interval", [0.1]),
        ("default_guidance_interval", None),
    ],
)
def test_what_no_call_could_use_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        pipeline_with(**{name: value})
