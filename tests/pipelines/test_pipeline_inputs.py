"""What the pipeline accepts, and that it refuses everything else before any work."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, MAETokDiffusionPipeline
from tests.pipelines.helpers import FLOW_MODE, NULL_CLASS, Passes, generator, generators, tiny_pipeline
from tests.testing_utils import seeded_normal, tiny_autoencoder, tiny_transformer


NAMES = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    2: "crane",
    3: "crane, tower crane",
    4: "black and gold garden spider, Argiope aurantia",
    5: "maillot",
}


def labels_seen(pipe: MAETokDiffusionPipeline, class_labels, **kwargs) -> list[int]:
    passes = Passes(pipe)
    pipe(class_labels, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **kwargs)
    assert len(passes.labels) == 1
    return passes.labels[0]


# Labels


@pytest.mark.parametrize(
    ("class_labels", "expected"),
    [
        (3, [3]),
        (0, [0]),
        (np.int64(3), [3]),
        ([3], [3]),
        ([1, 2, 1], [1, 2, 1]),
        ((1, 2), [1, 2]),
        (range(3), [0, 1, 2]),
        ([[1], [2]], [1, 2]),
        ([[1, [2, (3,)]], 4], [1, 2, 3, 4]),
        (torch.tensor(3), [3]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([[1], [2]], dtype=torch.int32), [1, 2]),
        ([torch.tensor([1]), torch.tensor(2)], [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (None, [NULL_CLASS]),
    ],
    ids=str,
)
def test_labels_by_index(class_labels, expected):
    assert labels_seen(tiny_pipeline(), class_labels) == expected


@pytest.mark.parametrize(
    ("class_labels", "expected"),
    [
        ("tench, Tinca tinca", [0]),
        ("tench", [0]),
        ("Tinca tinca", [0]),
        (" goldfish ", [1]),
        ("tower crane", [3]),
        ("black and gold garden spider", [4]),
        (["tench", "goldfish", 2], [0, 1, 2]),
        ([["tench"], [["goldfish"], torch.tensor([5])]], [0, 1, 5]),
    ],
    ids=str,
)
def test_labels_by_name(class_labels, expected):
    assert labels_seen(tiny_pipeline(id2label=NAMES), class_labels) == expected


def test_one_string_is_one_name():
    with pytest.raises(ValueError, match="'tench, goldfish' is not a class name of this pipeline"):
        labels_seen(tiny_pipeline(id2label=NAMES), "tench, goldfish")


def test_a_name_of_several_classes_is_refused():
    with pytest.raises(ValueError, match=r"'crane' is the name of classes \[2, 3\]: pass the index"):
        labels_seen(tiny_pipeline(id2label=NAMES), "crane")


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="'goldfisch' is not a class name .*: did you mean 'goldfish'"):
        labels_seen(tiny_pipeline(id2label=NAMES), ["tench", "goldfisch"])


def test_names_need_id2label():
    with pytest.raises(ValueError, match="'tench' needs `id2label`"):
        labels_seen(tiny_pipeline(), "tench")


def test_get_label_ids_and_labels():
    pipe = tiny_pipeline(id2label=NAMES)
    assert pipe.get_label_ids("tench") == [0]
    assert pipe.get_label_ids(["goldfish", "tench"]) == [1, 0]
    assert pipe.labels["crane"] == [2, 3] and pipe.labels["Carassius auratus"] == [1]
    assert tiny_pipeline().labels == {}


def test_a_thousand_names():
    names = {index: f"class {index}, number {index}" for index in range(1000)}
    pipe = tiny_pipeline(id2label=names, transformer={"num_classes": 1000})
    assert labels_seen(pipe, [f"number {index}" for index in range(999, 0, -37)]) == list(range(999, 0, -37))


@pytest.mark.parametrize("id2label", [["tench"], {"tench": 0}, {0: 1}, {0: None}, {1.5: "tench"}, {-1: "tench"}])
def test_a_bad_id2label_is_refused(id2label):
    with pytest.raises(ValueError, match="`id2label` must map class indices to names"):
        tiny_pipeline(id2label=id2label)


# Refusals


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sde", id2label=NAMES)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": 10}, r"`class_labels` must lie in \[0, 9\], got \[10\]"),
        ({"class_labels": [1, -1]}, r"`class_labels` must lie in \[0, 9\], got \[-1\]"),
        ({"class_labels": 1.0}, "`class_labels` must hold class indices .* or names, got 1.0 of float"),
        ({"class_labels": torch.tensor([1.0])}, "`class_labels` must hold class indices"),
        ({"class_labels": True}, "`class_labels` must hold class indices"),
        ({"class_labels": [None]}, "`class_labels` must hold class indices"),
        ({"class_labels": {0: 1}}, "`class_labels` must hold class indices"),
        ({"class_labels": []}, "`class_labels` is empty"),
        ({"class_labels": [[], []]}, "`class_labels` is empty"),
        ({"class_labels": "unicorn"}, "'unicorn' is not a class name"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a positive integer, got 0"),
        ({"num_inference_steps": -2}, "`num_inference_steps` must be a positive integer"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be a positive integer"),
        ({"num_images_per_label": 0}, "`num_images_per_label` must be a positive integer"),
        ({"guidance_scale": -0.1}, "`guidance_scale` must be a finite number of at least 0 .* got -0.1"),
        ({"guidance_scale": math.nan}, "`guidance_scale` must be a finite number"),
        ({"guidance_scale": math.inf}, "`guidance_scale` must be a finite number"),
        ({"guidance_scale": "1.9"}, "`guidance_scale` must be a finite number"),
        ({"guidance_scale": True}, "`guidance_scale` must be a finite number"),
        ({"guidance_interval": (0.8, 0.2)}, r"`guidance_interval` must be \(low, high\).*got \(0.8, 0.2\)"),
        ({"guidance_interval": (-0.1, 0.5)}, "`guidance_interval` must be"),
        ({"guidance_interval": (0.0, 1.5)}, "`guidance_interval` must be"),
        ({"guidance_interval": (0.0, math.nan)}, "`guidance_interval` must be"),
        ({"guidance_interval": (0.0, 750)}, "`guidance_interval` must be"),
        ({"guidance_interval": (0.5,)}, "`guidance_interval` must be"),
        ({"guidance_interval": 0.75}, "`guidance_interval` must be"),
        ({"generator": generators(1, 2)}, "`generator` is a list of 2, but 3 images are asked for"),
        ({"generator": 0}, "`generator` must be a `torch.Generator` or a list of them, got 0"),
        ({"generator": [None] * 3}, "`generator` must be a `torch.Generator`"),
        ({"latents": seeded_normal(2, 6, 4)}, r"`latents` must have shape \(3, 6, 4\) .* got \(2, 6, 4\)"),
        ({"latents": seeded_normal(3, 4, 6)}, "`latents` must have shape"),
        ({"latents": torch.zeros(3, 6, 4, dtype=torch.long)}, "`latents` must be a tensor of floats"),
        ({"latents": np.zeros((3, 6, 4))}, "`latents` must be a tensor of floats"),
        ({"output_type": "numpy"}, "`output_type` must be one of .*, got 'numpy'"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt"]},
            r"must be among \['latents', 'velocity'\], got \['prompt'\]",
        ),
        ({"sigmas": []}, "`num_inference_steps` must be a positive integer, got 0"),
        ({"sigmas": [0.5, 1.0]}, "`sigmas` must hold the start time of every step"),
        ({"sigmas": [1.0, 0.0]}, "`sigmas` must hold"),
        ({"sigmas": [2.0, 1.0]}, "`sigmas` must hold"),
        ({"sigmas": [1.0, math.nan]}, "`sigmas` must hold"),
    ],
    # without addresses of objects, so that all processes of a parallel run have the same names
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value))[:50] if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused_before_any_computation(pipe, kwargs, message, monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("computed something")

    monkeypatch.setattr(pipe.transformer, "forward", fail)
    monkeypatch.setattr(pipe.vae, "decode", fail)
    grid = pipe.scheduler.sigmas
    rng = generator()
    state = rng.get_state()
    with pytest.raises(ValueError, match=message):
        pipe(**({"class_labels": [1, 2, 3], "num_inference_steps": 2, "generator": rng} | kwargs))
    assert torch.equal(rng.get_state(), state) and pipe.scheduler.sigmas is grid


@pytest.mark.parametrize("name", ["dpm", "diffusers_heun"])
def test_a_custom_grid_needs_a_scheduler_that_takes_one(name):
    with pytest.raises(ValueError, match="`sigmas`: .* takes no custom grid"):
        tiny_pipeline(name)(1, sigmas=[1.0, 0.5])


# Components that do not fit each other


def refuse(message: str, vae=None, transformer=None, scheduler="euler", id2label=None) -> None:
    pipe = tiny_pipeline(scheduler, id2label=id2label, vae=vae, transformer=transformer)
    passes = Passes(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(1, num_inference_steps=1)
    assert not passes.times


def test_sizes_that_do_not_fit_are_refused():
    refuse("transformer's `sample_size` is 6, but the vae decodes latents of 8 tokens", vae={"num_latent_tokens": 8})
    refuse(
        "transformer's `in_channels` is 5, but the vae decodes latents of 4 channels", transformer={"in_channels": 5}
    )


def test_missing_components_are_named():
    pipe = MAETokDiffusionPipeline(None, tiny_transformer(), None)
    with pytest.raises(ValueError, match="built without its vae and scheduler: set `pipe.vae`"):
        pipe(1)


def test_image_tokens_as_latents_fit_a_transformer_of_their_number():
    pipe = tiny_pipeline(vae={"num_latent_tokens": 0}, transformer={"sample_size": 16})
    assert pipe(1, num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    refuse("decodes latents of 16 tokens", vae={"num_latent_tokens": 0})


def test_names_beyond_the_transformers_classes_are_refused():
    refuse(r"`id2label` names classes \[10\], but the transformer has 10 classes", id2label={9: "a", 10: "b"})


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunScheduler(),
        UniPCMultistepScheduler(**FLOW_MODE),
        DPMSolverMultistepScheduler(**FLOW_MODE),
        FlowMatchEulerMaruyamaScheduler(path="linear"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_cosine_transformer_needs_the_cosine_sampler(scheduler):
    refuse(
        "trained on the cosine path, but .* follows the linear one: use FlowMatchEulerMaruyamaScheduler",
        scheduler=scheduler,
        transformer={"path": "cosine"},
    )


def test_a_linear_transformer_refuses_the_cosine_sampler():
    refuse("trained on the linear path", scheduler=FlowMatchEulerMaruyamaScheduler(path="cosine"))


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), UniPCMultistepScheduler(), DPMSolverMultistepScheduler(prediction_type="flow_prediction")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_other_families_are_refused(scheduler):
    refuse("does not integrate flow-matching models", scheduler=scheduler)


def test_a_scheduler_that_shifts_by_resolution_is_refused():
    refuse("use_dynamic_shifting", scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def test_a_scheduler_that_runs_towards_the_noise_is_refused():
    refuse("invert_sigmas", scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_components_are_checked_as_they_are_when_called():
    pipe = MAETokDiffusionPipeline(tiny_autoencoder(), tiny_transformer(), DDIMScheduler())
    pipe.scheduler = FlowMatchHeunScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(1, num_inference_steps=1).images) == 1
