"""Where the answer is known: what the pipeline samples from Gaussians and mixtures, with and without guidance."""

import pytest
import torch

from maetok_hf import FlowMatchEulerMaruyamaScheduler
from maetok_hf.schedulers import PATHS
from maetok_hf.training.flow_matching import FlowMatchingObjective
from tests.pipelines.analytic import AffineTransformer, analytic_pipeline, analytic_transformer
from tests.schedulers.fields import Gaussian, Mixture, fit_order, full_gaussian, guided_gaussian, sde_moments


EVERYWHERE = (0.0, 1.0)
NOISE = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

# a class, the null class that contains it, and a weak model that spreads the class out
CLASS = Gaussian.independent([1.0, 0.2, -0.5], [0.5, 0.8, 0.4])
NULL = Gaussian.independent([0.0, 0.3, 0.1], [1.0, 1.1, 0.9])
CLASS_STD, NULL_STD = (field.covariance.diagonal().sqrt() for field in (CLASS, NULL))
WEAK = Gaussian.independent([0.8, 0.2, -0.2], [0.7, 0.9, 0.6])


def sample(pipe, **kwargs) -> torch.Tensor:
    settings = {"class_labels": [0] * len(NOISE), "latents": NOISE, "num_inference_steps": 100} | kwargs
    return pipe(**settings, output_type="latent").images


def guided_pipeline(method: str, scheduler="heun"):
    """A pipeline of which `method` is the automatic choice."""
    transformer = analytic_transformer(CLASS, NULL, temperature_embedding=method == "gft")
    weak = analytic_transformer(WEAK, NULL) if method == "autoguidance" else None
    return analytic_pipeline(transformer, scheduler, weak)


# Solvers


@pytest.mark.parametrize("field", [full_gaussian(), Mixture.three_modes()], ids=lambda field: type(field).__name__)
@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2)])
def test_the_pipeline_converges_to_the_exact_end_at_the_order_of_its_solver(scheduler, order, field):
    pipe = analytic_pipeline(analytic_transformer(field, field), scheduler)
    steps = [16, 32, 64, 128]
    errors = [
        (sample(pipe, guidance_scale=1.0, num_inference_steps=n) - field.flow(NOISE)).square().mean().sqrt().item()
        for n in steps
    ]
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)
    assert errors[-1] < (2e-2 if order == 1 else 2e-4)


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_reaches_the_covariance_of_the_data(path):
    field, count = full_gaussian(path), 20_000
    pipe = analytic_pipeline(analytic_transformer(field, field), FlowMatchEulerMaruyamaScheduler(path=path))
    samples = pipe(
        num_images_per_label=count,
        num_inference_steps=200,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images[:, 0]
    # the end of these very steps, and the data, from which 200 steps are less than 0.02 away
    pipe.scheduler.set_timesteps(200)
    expected_mean, expected = sde_moments(pipe.scheduler, field)
    assert (expected - field.covariance).abs().max() < 0.02 and (expected_mean - field.mean).abs().max() < 0.02
    variances = expected.diagonal()
    standard_error = ((variances[:, None] * variances + expected.square()) / count).sqrt()
    assert ((samples.T.cov() - expected).abs() < 4 * standard_error).all()
    assert ((samples.mean(0) - expected_mean).abs() < 4 * (variances / count).sqrt()).all()


def test_the_sde_reaches_a_mixture():
    field, count = Mixture.three_modes(), 10_000
    pipe = analytic_pipeline(analytic_transformer(field, field, in_channels=1), "sde")
    samples = pipe(
        num_images_per_label=count, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images.flatten()
    ranks = field.cdf(samples.sort().values)
    distance = (ranks - (torch.arange(count) + 0.5) / count).abs().max().item()
    # 1.63 / sqrt(n) is the 99 % point of Kolmogorov and Smirnov's distance; the rest is for the 250 steps
    assert distance < 1.63 / count**0.5 + 0.005


# Guidance


def test_the_closed_forms_are_those_of_simple_cases():
    """Equal deviations: means extrapolate. Equal means at 0: deviations do, in their logarithms."""
    mean, std = guided_gaussian(
        Gaussian.independent([1.0], [0.5]), Gaussian.independent([0.2], [0.5]), 3.0, EVERYWHERE
    )
    torch.testing.assert_close((mean.item(), std.item()), (0.2 + 3 * 0.8, 0.5))
    mean, std = guided_gaussian(
        Gaussian.independent([0.0], [0.5]), Gaussian.independent([0.0], [0.8]), 3.0, EVERYWHERE
    )
    torch.testing.assert_close((mean.item(), std.item()), (0.0, 0.5**3 / 0.8**2))


@pytest.mark.parametrize("interval", [EVERYWHERE, (0.0, 0.75), (0.25, 0.5)], ids=str)
@pytest.mark.parametrize("method", ["cfg", "autoguidance", "gft"])
def test_guidance_carries_gaussians_to_their_fixed_point(method, interval):
    scale, steps = 2.5, 400
    # both ends of the interval count as inside, so the step that starts at its low end is guided as well
    guided = (max(0.0, interval[0] - 1 / steps), interval[1])
    mean, std = guided_gaussian(CLASS, WEAK if method == "autoguidance" else NULL, scale, guided)
    actual = sample(
        guided_pipeline(method), guidance_scale=scale, guidance_interval=interval, num_inference_steps=steps
    )
    torch.testing.assert_close(actual, mean + std * NOISE, rtol=0, atol=2e-4)
    # which is neither the class nor far beyond it by accident
    assert (mean - CLASS.mean).abs().max() > 0.1 and (std / CLASS.covariance.diagonal().sqrt()).max() < 0.99


@pytest.mark.parametrize("method", ["cfg", "autoguidance", "gft"])
@pytest.mark.parametrize(("scheduler", "order"), [("euler", 1), ("heun", 2)])
def test_guidance_in_an_interval_keeps_the_solvers_order(scheduler, order, method):
    interval = (0.0, 0.75)
    mean, std = guided_gaussian(CLASS, WEAK if method == "autoguidance" else NULL, 1.9, interval)
    pipe, steps = guided_pipeline(method, scheduler), [16, 32, 64, 128]
    errors = [
        (sample(pipe, guidance_interval=interval, num_inference_steps=n) - (mean + std * NOISE)).abs().max().item()
        for n in steps
    ]
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "unipc", "sde"])
@pytest.mark.parametrize("temperature", [1.0, 0.8, 1 / 1.9, 0.25])
def test_gft_at_a_temperature_is_cfg_at_its_inverse(temperature, scheduler):
    settings = {"guidance_interval": (0.1, 0.6), "num_inference_steps": 20}
    gft, cfg = guided_pipeline("gft", scheduler), guided_pipeline("cfg", scheduler)
    actual = sample(gft, guidance_temperature=temperature, generator=torch.Generator().manual_seed(2), **settings)
    expected = sample(cfg, guidance_scale=1 / temperature, generator=torch.Generator().manual_seed(2), **settings)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert sorted(set(gft.transformer.temperatures)) == pytest.approx(sorted({temperature, 1.0}))


def train_guidance_free(transformer: AffineTransformer) -> None:
    """
    To the optimum of the objective.

    An affine fit depends on the first two moments of data and noise only, and the four pairs of signs have those of
    the standard normal distribution: no error of sampling is left. Rows without a class show the null class's data.
    """
    steps = transformer.config.num_steps
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # a temperature of 0 stands for a dropped class
    temperatures = torch.tensor([0.25, 0.5, 0.75, 1.0, 0.0], dtype=torch.float64)
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    rows = torch.cartesian_prod(times, temperatures, signs, signs)
    draw, temperature, data_sign, noise_sign = (column[:, None, None] for column in rows.T)
    dropped = temperature == 0
    mean, std = torch.where(dropped, NULL.mean, CLASS.mean), torch.where(dropped, NULL_STD, CLASS_STD)
    batch = {
        "latents": mean + std * data_sign,
        "class_labels": torch.zeros(len(rows), dtype=torch.long),
        "draw": draw.flatten(),
        "noise": noise_sign.expand(-1, 1, 3),
        "class_drop_mask": dropped.flatten(),
        "guidance_temperature": temperature.flatten(),
    }
    objective = FlowMatchingObjective(transformer, guidance_free=True)
    optimizer = torch.optim.LBFGS(transformer.parameters(), lr=1.0, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(**batch)["loss"]
        loss.backward()
        return loss

    # the null class does not depend on the class: once it has converged, the class sees a fixed problem
    for _ in range(4):
        optimizer.step(closure)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.3])
def test_guidance_free_training_ends_at_cfg(temperature, trained):
    """The objective's own optimum, sampled in one pass a step, is guidance by the exact velocities in two."""
    settings = {"num_inference_steps": trained.config.num_steps, "guidance_interval": EVERYWHERE}
    actual = sample(analytic_pipeline(trained, "euler"), guidance_temperature=temperature, **settings)
    expected = sample(guided_pipeline("cfg", "euler"), guidance_scale=1 / temperature, **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    plain = sample(guided_pipeline("cfg", "euler"), guidance_scale=1.0, **settings)
    assert temperature == 1 or (expected - plain).abs().max() > 0.5


@pytest.fixture(scope="module")
def trained():
    transformer = AffineTransformer(num_steps=20)
    train_guidance_free(transformer)
    return transformer


def test_autoguidance_narrows_without_moving_a_mean_that_both_models_know():
    """A weak model spreads the data, and guiding away from it sharpens; CFG also pushes away from the null class."""
    weak = CLASS._replace(covariance=2 * CLASS.covariance)
    mean, std = guided_gaussian(CLASS, weak, 1.5, EVERYWHERE)
    pipe = analytic_pipeline(analytic_transformer(CLASS, NULL), "heun", analytic_transformer(weak, NULL))
    actual = sample(pipe, guidance_scale=1.5, guidance_interval=EVERYWHERE, num_inference_steps=200)
    torch.testing.assert_close(actual, mean + std * NOISE, rtol=0, atol=3e-4)
    torch.testing.assert_close(mean, CLASS.mean)
    torch.testing.assert_close(std, CLASS.covariance.diagonal().sqrt() * 2**-0.25)
