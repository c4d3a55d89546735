"""What a call of the pipeline reports while it runs and returns in the end."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FirstBlockCacheConfig, ImagePipelineOutput, PyramidAttentionBroadcastConfig
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from maetok_hf import denormalize_latents
from tests.pipelines.helpers import SCHEDULERS, Passes, generator, tiny_pipeline
from tests.testing_utils import seeded_normal


def run(pipe, **kwargs):
    settings = {"class_labels": [3, 5], "num_inference_steps": 4, "generator": generator(), "output_type": "np"}
    return pipe(**(settings | kwargs)).images


# Outputs


def test_output_types_agree():
    pipe = tiny_pipeline()
    as_array = run(pipe)
    assert as_array.shape == (2, 32, 32, 3) and as_array.dtype == np.float32
    assert as_array.min() >= 0 and as_array.max() <= 1 and as_array.std() > 0.05
    as_tensor = run(pipe, output_type="pt")
    np.testing.assert_array_equal(as_tensor.permute(0, 2, 3, 1).numpy(), as_array)
    as_images = run(pipe, output_type="pil")
    assert all(isinstance(image, PIL.Image.Image) for image in as_images)
    np.testing.assert_array_equal(np.stack(as_images), (as_array * 255).round().astype(np.uint8))


def test_images_are_the_decoded_latents_brought_back_to_the_tokenizers_scale():
    pipe = tiny_pipeline(vae={"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [0.5, 1.0, 2.0, 3.0]})
    latents = run(pipe, output_type="latent")
    raw = latents * torch.tensor([0.5, 1.0, 2.0, 3.0]) + torch.tensor([0.5, -1.0, 0.0, 2.0])
    torch.testing.assert_close(denormalize_latents(latents, pipe.vae.config), raw)
    with torch.no_grad():
        images = pipe.vae.decode(raw).sample
    torch.testing.assert_close(run(pipe, output_type="pt"), (images / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


def test_latents_need_no_statistics_and_images_do():
    pipe = tiny_pipeline(vae={"latents_mean": None, "latents_std": None})
    passes = Passes(pipe)
    with pytest.raises(ValueError, match="no `latents_mean` and no `latents_std`"):
        run(pipe)
    assert not passes.times
    assert run(pipe, output_type="latent").shape == (2, 6, 4)


def test_return_dict():
    pipe = tiny_pipeline()
    settings = {"num_inference_steps": 2, "output_type": "np"}
    output = pipe(3, generator=generator(), **settings)
    as_tuple = pipe(3, generator=generator(), return_dict=False, **settings)
    assert isinstance(output, ImagePipelineOutput)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    np.testing.assert_array_equal(output.images, as_tuple[0])


def test_no_gradients_are_kept():
    assert not run(tiny_pipeline(), output_type="pt").requires_grad


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 4), ("sde", 4), ("heun", 7)])
def test_the_progress_bar_counts_evaluations_and_can_be_silenced(name, evaluations, capfd):
    pipe = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=False)
    run(pipe)
    assert f"{evaluations}/{evaluations}" in capfd.readouterr().err
    assert pipe.num_timesteps == evaluations
    pipe.set_progress_bar_config(disable=True)
    run(pipe)
    assert capfd.readouterr().err == ""


# Callbacks


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_callback_follows_every_evaluation(name):
    pipe = tiny_pipeline(name)
    calls = []

    def record(pipe, step, timestep, tensors):
        assert list(tensors) == ["latents"] and tensors["latents"].shape == (2, 6, 4)
        assert pipe.current_timestep == timestep
        calls.append((step, float(timestep)))
        return tensors

    run(pipe, callback_on_step_end=record)
    assert calls == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert pipe.current_timestep is None


def test_the_callback_may_change_the_latents():
    def clear(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    assert not run(tiny_pipeline(), callback_on_step_end=clear, output_type="latent").any()


def test_the_callback_may_return_nothing_and_ask_for_nothing():
    pipe = tiny_pipeline()
    seen = []
    images = run(
        pipe,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * 4
    np.testing.assert_array_equal(images, run(pipe))


def test_the_callback_may_see_the_velocity_that_a_step_took():
    pipe = tiny_pipeline("euler")
    noise = seeded_normal(2, 6, 4)
    before, clean = [noise], []

    def record(pipe, step, timestep, tensors):
        time, time_after = pipe.scheduler.sigmas[step : step + 2]
        torch.testing.assert_close(tensors["latents"], before[-1] + (time_after - time) * tensors["velocity"])
        clean.append(before[-1] - time * tensors["velocity"])
        before.append(tensors["latents"])

    settings = {"callback_on_step_end_tensor_inputs": ["latents", "velocity"], "guidance_scale": 3.0}
    latents = run(pipe, latents=noise, callback_on_step_end=record, output_type="latent", **settings)
    # the last step ends where it predicts the data
    torch.testing.assert_close(torch.as_tensor(latents), clean[-1])
    assert len(clean) == 4


def test_the_callback_may_interrupt():
    pipe = tiny_pipeline()
    passes = Passes(pipe)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    run(pipe, callback_on_step_end=stop, guidance_scale=1.0)
    assert passes.times == [1, 0.75] and pipe.interrupt
    # the next run starts afresh
    run(pipe, guidance_scale=1.0)
    assert len(passes.times) == 2 + 4 and not pipe.interrupt


def test_the_callback_may_change_the_guidance_scale():
    pipe = tiny_pipeline()
    passes = Passes(pipe)

    def switch_off(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0 if step >= 1 else pipe.guidance_scale
        return tensors

    run(pipe, callback_on_step_end=switch_off, guidance_scale=4.0, guidance_interval=(0.0, 1.0))
    assert passes.guided_times == [1, 0.75]
    assert pipe.guidance_scale == 1


class Doubling(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": 2 * callback_kwargs["latents"]}


def test_diffusers_callback_objects_bring_their_own_inputs():
    pipe = tiny_pipeline()
    settings = {"num_inference_steps": 1, "output_type": "latent", "callback_on_step_end_tensor_inputs": []}
    plain = run(pipe, **settings)
    torch.testing.assert_close(run(pipe, **settings, callback_on_step_end=Doubling()), 2 * plain)
    twice = MultiPipelineCallbacks([Doubling(), Doubling()])
    torch.testing.assert_close(run(pipe, **settings, callback_on_step_end=twice), 4 * plain)


# diffusers' caches and casting, through the pipeline


def test_first_block_cache_skips_blocks_apart_for_both_passes():
    pipe = tiny_pipeline(transformer={"num_layers": 4})
    settings = {"num_inference_steps": 6, "guidance_interval": (0.0, 1.0), "guidance_scale": 3.0}
    exact = run(pipe, **settings)
    evaluated = []
    pipe.transformer.transformer_blocks[-1].ff.register_forward_hook(lambda *args: evaluated.append(1))

    # the threshold decides: nothing is ever reused, or everything after each branch's first pass
    for threshold, expected in ((0.0, 12), (1e9, 2)):
        evaluated.clear()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        images = run(pipe, **settings)
        assert len(evaluated) == expected
        assert (np.abs(images - exact).max() < 1e-5) == (threshold == 0)
        np.testing.assert_array_equal(run(pipe, **settings), images)  # nothing leaks into the next run
        pipe.transformer.disable_cache()
    np.testing.assert_allclose(run(pipe, **settings), exact, atol=1e-6)


def test_timestep_driven_caches_read_the_pipelines_current_timestep():
    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    evaluated = []
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda *args: evaluated.append(pipe.current_timestep.item())
    )
    run(pipe, num_inference_steps=8, guidance_scale=1.0)
    # above 800 always, then every other time
    assert evaluated == [1000, 875, 750, 500, 250]


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_layerwise_casting(compute_dtype):
    pipe = tiny_pipeline()
    exact = run(pipe)
    pipe.to(compute_dtype)
    for model in (pipe.vae, pipe.transformer):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    images = run(pipe)
    assert np.isfinite(images).all() and np.abs(images - exact).mean() < 0.1
