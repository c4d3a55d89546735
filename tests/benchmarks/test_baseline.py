"""The naive form computes what the models compute, and never less."""

import pytest
import torch

from benchmarks.baseline import NaiveSiT, NaiveTokenizer
from maetok_hf import FlowMatchEulerMaruyamaScheduler, MAETokDiffusionPipeline
from tests.testing_utils import seeded_normal, tiny_autoencoder, tiny_transformer


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_tokenizer(modulated, class_token):
    ours = tiny_autoencoder(modulated_decoder=modulated, decoder_class_token=class_token).double()
    naive = NaiveTokenizer(ours)
    side = ours.config.sample_size
    pixels = seeded_normal(2, 3, side, side, dtype=torch.float64)
    latents = ours.encode(pixels).latent
    torch.testing.assert_close(naive.encode(pixels), latents, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(naive.decode(latents), ours.decode(latents).sample, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_velocity():
    ours = tiny_transformer().eval()
    config = ours.config
    latents = seeded_normal(3, config.sample_size, config.in_channels)
    times, labels = torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0, 1, config.num_classes])
    expected = ours(latents, times, labels).sample
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(NaiveSiT(ours)(latents, times, labels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
def test_guided_sampling(stochastic):
    transformer, vae = tiny_transformer().eval(), tiny_autoencoder(latents_mean=0.0, latents_std=1.0)
    config, steps = transformer.config, 6
    shape = (2, config.sample_size, config.in_channels)
    noise, labels = seeded_normal(*shape), torch.tensor([0, 1])
    draws = [seeded_normal(*shape, seed=step) for step in range(1, steps)] if stochastic else None
    found = NaiveSiT(transformer).sample(noise, labels, draws, steps, 1.9, (0.0, 0.75))

    if stochastic:
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(steps)
        latents = noise
        for step, t in enumerate(scheduler.timesteps):
            time = scheduler.sigmas[step].item()
            velocities = [
                transformer(latents, torch.full((2,), time), label).sample
                for label in (labels, torch.full_like(labels, config.num_classes))
            ]
            velocity = velocities[1] + 1.9 * (velocities[0] - velocities[1]) if time <= 0.75 else velocities[0]
            draw = draws[step] if step < steps - 1 else None
            latents = scheduler.step(velocity.detach(), t, latents, noise=draw, return_dict=False)[0]
    else:
        from diffusers import FlowMatchEulerDiscreteScheduler

        pipe = MAETokDiffusionPipeline(vae, transformer, FlowMatchEulerDiscreteScheduler())
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            labels.tolist(), 1.9, (0.0, 0.75), steps, latents=noise, output_type="latent", return_dict=False
        )[0]
    torch.testing.assert_close(found.float(), latents.float(), atol=1e-4, rtol=1e-4)
