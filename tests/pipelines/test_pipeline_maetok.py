"""How the pipeline samples: trajectories, guidance, noise."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from maetok_hf import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchHeunScheduler,
    MAETokDiffusionPipeline,
    convert_transformer,
)
from maetok_hf.schedulers import scheduling_flow_match_euler_maruyama
from tests.pipelines.helpers import NULL_CLASS, SCHEDULERS, Passes, generator, generators, tiny_pipeline
from tests.testing_utils import GOLDEN, seeded_normal, tiny_autoencoder


def sample_latents(pipe: MAETokDiffusionPipeline, **kwargs) -> torch.Tensor:
    settings = {"class_labels": 3, "num_inference_steps": 4, "latents": seeded_normal(1, 6, 4)} | kwargs
    return pipe(**settings, output_type="latent").images


# Trajectories


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "sit" / "io.safetensors")


@pytest.mark.parametrize(
    ("scheduler", "name", "guidance_scale", "interval"),
    [
        (FlowMatchEulerDiscreteScheduler(), "euler", 1.0, (0.0, 1.0)),
        (FlowMatchHeunScheduler(), "heun", 1.0, (0.0, 1.0)),
        (FlowMatchEulerDiscreteScheduler(), "euler_cfg", 1.9, (0.0, 0.75)),
        (FlowMatchEulerMaruyamaScheduler(), "sde_linear", 1.0, (0.0, 1.0)),
        (FlowMatchEulerMaruyamaScheduler(), "sde_linear_cfg", 1.5, (0.0, 0.7)),
        (FlowMatchEulerMaruyamaScheduler(path="cosine"), "sde_cosine_cfg", 1.5, (0.1, 0.9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_golden_trajectories(scheduler, name, guidance_scale, interval, golden, monkeypatch):
    draws = iter(golden.get(f"noise_{name}", []))
    monkeypatch.setattr(scheduling_flow_match_euler_maruyama, "randn_tensor", lambda *args, **kwargs: next(draws))
    transformer = convert_transformer(GOLDEN / "sit")
    transformer.register_to_config(path=scheduler.config.get("path", "linear"))
    pipe = MAETokDiffusionPipeline(tiny_autoencoder(num_latent_tokens=8, latent_channels=8), transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    actual = sample_latents(
        pipe,
        class_labels=golden["class_labels"],
        guidance_scale=guidance_scale,
        guidance_interval=interval,
        num_inference_steps=12,
        latents=golden["noise"].double(),
    )
    torch.testing.assert_close(actual.double(), golden[f"out_{name}"], rtol=0, atol=1e-5)
    assert next(draws, None) is None


@pytest.mark.parametrize("name", ["unipc", "dpm"])
def test_multistep_solvers_approach_the_fine_solution_faster_than_euler(name):
    latents = seeded_normal(4, 6, 4)
    settings = {"class_labels": [0, 1, 2, 3], "latents": latents, "guidance_interval": (0.0, 1.0)}
    exact = sample_latents(tiny_pipeline("heun"), **settings, num_inference_steps=200)

    def error(scheduler, steps):
        approximate = sample_latents(tiny_pipeline(scheduler), **settings, num_inference_steps=steps)
        return (approximate - exact).abs().max().item() / (exact - latents).abs().max().item()

    assert error(name, 40) < 5e-3
    assert error(name, 40) < error("euler", 40) / 5
    assert error(name, 40) < error(name, 10) / 4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_transformer_sees_the_schedulers_times(name):
    """In [0, 1], and not the rounded timesteps of some schedulers."""
    pipe = tiny_pipeline(name)
    passes = Passes(pipe)
    sample_latents(pipe, guidance_scale=1.0, num_inference_steps=7)
    np.testing.assert_allclose(passes.times, pipe.scheduler.sigmas[:-1].tolist(), rtol=1e-6)
    # DPM-Solver++ starts its own grid at 0.999
    assert passes.times[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "unipc"])
def test_the_grid_is_uniform_unless_it_is_given(name):
    pipe = tiny_pipeline(name)
    passes = Passes(pipe)
    sample_latents(pipe, guidance_scale=1.0, num_inference_steps=4)
    assert sorted(set(np.round(passes.times, 5)), reverse=True) == [1, 0.75, 0.5, 0.25]
    passes.times.clear()
    sample_latents(pipe, guidance_scale=1.0, sigmas=[1.0, 0.6, 0.1])
    assert sorted(set(np.round(passes.times, 5)), reverse=True) == [1, 0.6, 0.1]


def test_a_custom_grid_reaches_the_sde_sampler():
    pipe = tiny_pipeline("sde")
    passes = Passes(pipe)
    sample_latents(pipe, guidance_scale=1.0, sigmas=[1.0, 0.6, 0.1])
    np.testing.assert_allclose(passes.times, [1, 0.6, 0.1])


def test_the_shift_of_a_scheduler_applies():
    pipe = tiny_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    passes = Passes(pipe)
    sample_latents(pipe, guidance_scale=1.0, num_inference_steps=2)
    np.testing.assert_allclose(passes.times, [1, 0.75])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_low_precision_models_leave_the_state_in_float32(name):
    pipe = tiny_pipeline(name).to(torch.bfloat16)
    dtypes = []

    def record(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)

    images = pipe(3, num_inference_steps=3, generator=generator(), output_type="np", callback_on_step_end=record)
    assert set(dtypes) == {torch.float32}
    assert images.images.dtype == np.float32

    reference = tiny_pipeline(name)(3, num_inference_steps=3, generator=generator(), output_type="np")
    assert np.abs(images.images - reference.images).max() < 0.1


@pytest.mark.parametrize(
    ("given", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_state_of_given_latents_is_float32_or_better(given, state):
    pipe = tiny_pipeline("sde").to(torch.bfloat16)
    assert sample_latents(pipe, latents=seeded_normal(1, 6, 4, dtype=given)).dtype == state


def test_float64_models_are_not_rounded():
    pipe = tiny_pipeline().to(torch.float64)
    latents = seeded_normal(1, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        inputs = latents, torch.ones(1), torch.tensor([3])
        expected = pipe.transformer(*inputs).sample
    actual = pipe._evaluate(pipe.transformer, "cond", latents, 1.0, inputs[2])
    assert actual.dtype == torch.float64 and torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["euler", "sde"])
def test_models_in_training_mode_sample_without_dropout_and_stay_in_it(name):
    dropout = {"vae": {"decoder_drop_path_rate": 0.9}, "transformer": {"class_dropout_prob": 0.9}}
    settings = {"class_labels": [1, 2, 3], "num_inference_steps": 3, "output_type": "np"}
    expected = tiny_pipeline(name, **dropout)(**settings, generator=generator()).images
    pipe = tiny_pipeline(name, **dropout)
    pipe.transformer.train().transformer_blocks[1].eval()
    pipe.vae.train()
    state = torch.get_rng_state()
    images = pipe(**settings, generator=generator()).images
    np.testing.assert_array_equal(images, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in pipe.vae.modules())
    assert pipe.transformer.training and not pipe.transformer.transformer_blocks[1].attn.training


def test_defaults_are_the_published_settings():
    config = tiny_pipeline().config
    assert config.default_num_inference_steps == 250
    assert config.default_guidance_scale == 1.9
    assert config.default_guidance_interval == [0.0, 0.75]
    assert FlowMatchEulerMaruyamaScheduler().config.last_step_size == 0.04


# Guidance


def test_guidance_combines_the_two_velocities():
    pipe = tiny_pipeline()
    noise = seeded_normal(2, 6, 4)
    velocities = []
    for labels in ([3, 4], [NULL_CLASS] * 2):
        with torch.no_grad():
            velocities.append(pipe.transformer(noise, torch.ones(2), torch.tensor(labels)).sample)
    expected = noise - (velocities[1] + 2.5 * (velocities[0] - velocities[1]))
    settings = {"class_labels": [3, 4], "latents": noise, "num_inference_steps": 1}
    actual = sample_latents(pipe, **settings, guidance_scale=2.5, guidance_interval=(0.0, 1.0))
    torch.testing.assert_close(actual, expected)


def test_scale_one_is_the_conditional_model_and_scale_zero_the_unconditional_one():
    pipe = tiny_pipeline()
    everywhere = {"guidance_interval": (0.0, 1.0)}
    nowhere = {"guidance_interval": (0.99, 0.999)}
    torch.testing.assert_close(
        sample_latents(pipe, guidance_scale=1.0, **everywhere), sample_latents(pipe, guidance_scale=3.0, **nowhere)
    )
    torch.testing.assert_close(
        sample_latents(pipe, guidance_scale=0.0, **everywhere), sample_latents(pipe, class_labels=None)
    )


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), [1, 0.75, 0.5, 0.25]),
        ((0.0, 0.75), [0.75, 0.5, 0.25]),
        ((0.25, 0.5), [0.5, 0.25]),
        ((0.5, 0.5), [0.5]),
        ((0.3, 0.45), []),
        ([0.3, 1], [1, 0.75, 0.5]),
    ],
)
def test_the_null_pass_runs_inside_the_interval_only(interval, guided):
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    sample_latents(pipe, guidance_interval=interval)
    assert passes.guided_times == guided
    assert len(passes.times) == 4 + len(guided)


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"class_labels": None}])
def test_there_is_one_pass_a_step_without_guidance(settings):
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    sample_latents(pipe, guidance_interval=(0.0, 1.0), **settings)
    assert len(passes.times) == 4
    assert passes.labels == 4 * [[NULL_CLASS if "class_labels" in settings else 3]]


@pytest.mark.parametrize("end", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("name", ["euler", "unipc", "sde"])
def test_both_ends_of_the_interval_count_as_inside(name, end):
    """Also where a float32 grid rounds them, as 0.3 to 0.30000001."""
    pipe = tiny_pipeline(name)
    passes = Passes(pipe)
    sample_latents(pipe, guidance_interval=(end, end), sigmas=np.linspace(1, 0.1, 10))
    np.testing.assert_allclose(passes.guided_times, [end], rtol=1e-6)


def test_the_last_step_of_the_sde_is_tested_at_its_own_time():
    pipe = tiny_pipeline("sde")
    passes = Passes(pipe)
    sample_latents(pipe, guidance_interval=(0.0, 0.04))
    np.testing.assert_allclose(passes.guided_times, [0.04])


@pytest.mark.parametrize("name", ["heun", "diffusers_heun"])
def test_heuns_corrector_is_guided_if_its_step_started_inside(name):
    pipe = tiny_pipeline(name)
    passes = Passes(pipe)
    sample_latents(pipe, guidance_interval=(0.6, 0.8))
    times = sorted(set(pipe.scheduler.sigmas.tolist()), reverse=True)
    # the steps start at 1, about 0.75, 0.5 and 0.25: predictor and corrector of the second one
    np.testing.assert_allclose(passes.guided_times, times[1:3], rtol=1e-6)


def test_a_label_equal_to_the_null_class_is_not_mistaken_for_no_label():
    with pytest.raises(ValueError, match=r"`class_labels` must lie in \[0, 9\], got \[10\]"):
        sample_latents(tiny_pipeline(), class_labels=NULL_CLASS)


# Noise


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_generator_per_image_gives_the_same_image_for_any_batch(name):
    pipe = tiny_pipeline(name)
    settings = {"num_inference_steps": 5, "output_type": "np"}
    batch = pipe([1, 2, 3], generator=generators(10, 11, 12), **settings).images
    for index in range(3):
        single = pipe([1 + index], generator=generators(10 + index), **settings).images
        np.testing.assert_allclose(batch[index : index + 1], single, atol=1e-5)
    other = pipe([1, 2, 3], generator=generators(10, 99, 12), **settings).images
    np.testing.assert_allclose(other[[0, 2]], batch[[0, 2]], atol=1e-5)
    assert np.abs(other[1] - batch[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["euler", "sde"])
def test_a_seed_repeats_a_run_and_global_state_takes_no_part(name):
    pipe = tiny_pipeline(name)
    state = torch.get_rng_state()
    first, second = (pipe(3, num_inference_steps=3, generator=generator(), output_type="np").images for _ in "ab")
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_given_latents_are_the_initial_noise():
    pipe = tiny_pipeline()
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    drawn = pipe([1, 2], generator=generator(), **settings).images
    given = pipe([1, 2], latents=torch.randn(2, 6, 4, generator=generator()), **settings).images
    assert torch.equal(drawn, given)


def test_given_latents_are_left_alone():
    latents = seeded_normal(1, 6, 4)
    sample_latents(tiny_pipeline(), latents=latents)
    assert torch.equal(latents, seeded_normal(1, 6, 4))


def test_images_of_one_label_are_neighbours():
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    settings = {"num_inference_steps": 2, "output_type": "np"}
    images = pipe([4, 7], num_images_per_label=3, generator=generators(*range(6)), **settings).images
    assert passes.labels[0] == [4, 4, 4, 7, 7, 7]
    assert len(images) == 6
    single = pipe(7, generator=generators(4), **settings).images
    np.testing.assert_allclose(images[4:5], single, atol=1e-5)


def test_sampling_without_labels_takes_a_number_of_images():
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    images = pipe(
        num_images_per_label=3, num_inference_steps=1, generator=generators(0, 1, 2), output_type="np"
    ).images
    assert len(images) == 3 and passes.labels == [[NULL_CLASS] * 3]
