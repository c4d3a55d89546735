"""How fast samplers approach an end that is known in closed form."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from maetok_hf.schedulers import PATHS
from tests.schedulers.fields import Mixture, fit_order, full_gaussian, integrate, sde_moments


NOISE = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIELDS = {"gaussian": full_gaussian, "mixture": Mixture.three_modes}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("problem", FIELDS)
def test_the_exact_flow_goes_on_where_it_was_left(problem, path):
    """What the orders below are measured against: following the velocity for a moment does not change the end."""
    field, t, moment = FIELDS[problem](path), 0.6, 1e-4
    ahead, behind = (NOISE + sign * moment * field.velocity(NOISE, t) for sign in (1, -1))
    torch.testing.assert_close(field.flow(ahead, t + moment), field.flow(behind, t - moment), rtol=0, atol=1e-6)
    assert (field.flow(ahead, t) - field.flow(behind, t)).abs().max() > 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("problem", FIELDS)
@pytest.mark.parametrize(
    ("scheduler", "order"), [(FlowMatchEulerDiscreteScheduler, 1), (FlowMatchHeunScheduler, 2)], ids=["euler", "heun"]
)
def test_ode_solvers_converge_at_their_order(scheduler, order, problem, path):
    """The ODE's solvers know nothing of the path: the velocity does."""
    field, steps, errors = FIELDS[problem](path), [16, 32, 64, 128], []
    for count in steps:
        solver = scheduler()
        solver.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
        errors.append((integrate(solver, field.velocity, NOISE) - field.flow(NOISE)).square().mean().sqrt().item())
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_converges_to_the_distribution_of_the_data_at_order_one(path):
    field, steps, errors = full_gaussian(path), [32, 64, 128, 256], []
    for count in steps:
        scheduler = FlowMatchEulerMaruyamaScheduler(path=path)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
        mean, covariance = sde_moments(scheduler, field)
        errors.append(torch.linalg.norm(torch.cat([covariance - field.covariance, (mean - field.mean)[None]])).item())
    assert fit_order(steps, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("path", PATHS)
def test_the_published_last_step_keeps_its_own_error(path):
    """From t = 0.04 to 0 at once, without noise, however many steps there are before."""
    field, errors = full_gaussian(path), []
    for count in (1000, 2000):
        scheduler = FlowMatchEulerMaruyamaScheduler(path=path)
        scheduler.set_timesteps(count)
        errors.append(torch.linalg.norm(sde_moments(scheduler, field)[1] - field.covariance).item())
    assert errors[1] == pytest.approx(errors[0], rel=0.1) and 5e-3 < errors[1] < 1e-2
