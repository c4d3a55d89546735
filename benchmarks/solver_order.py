"""How fast the solvers approach the exact end of a flow: measured where the end is known in closed form.

The velocity is that of data from a Gaussian with a full covariance, or from a mixture of three Gaussians in one
dimension; the exact end points are in `tests/schedulers/fields.py`. Noise is carried from the first time of a solver's
own grid (UniPC and DPM-Solver++ start a little below 1) to 0 on grids of growing numbers of steps. The order is the
slope of the error in the number of steps, over all of them and over the last doubling. The SDE has no end points: its
error is that of the covariance it gives a Gaussian, which follows from its steps without drawing a sample.

    python -m benchmarks.solver_order

writes `solver_order.json` and `.md`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from maetok_hf.schedulers import PATHS
from tests.schedulers.fields import Gaussian, Mixture, fit_order, full_gaussian, integrate, sde_moments

from .machine import RESULTS, machine, machine_line, table, write_results


COMMAND = "python -m benchmarks.solver_order"
STEPS = (8, 16, 32, 64, 128, 256)
FLOW_MODE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS: dict[str, Callable[[], SchedulerMixin]] = {
    "FlowMatchEulerDiscreteScheduler": lambda: FlowMatchEulerDiscreteScheduler(),
    "FlowMatchHeunScheduler": lambda: FlowMatchHeunScheduler(),
    "FlowMatchHeunDiscreteScheduler": lambda: FlowMatchHeunDiscreteScheduler(),
    "UniPCMultistepScheduler, solver_order=2": lambda: UniPCMultistepScheduler(**FLOW_MODE),
    "UniPCMultistepScheduler, solver_order=3": lambda: UniPCMultistepScheduler(**FLOW_MODE, solver_order=3),
    "DPMSolverMultistepScheduler, solver_order=2": lambda: DPMSolverMultistepScheduler(**FLOW_MODE),
    "DPMSolverMultistepScheduler, solver_order=3": lambda: DPMSolverMultistepScheduler(**FLOW_MODE, solver_order=3),
}
OWN_GRID = (FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler)  # those that take no other


def set_grid(scheduler: SchedulerMixin, steps: int) -> None:
    """The grid that the pipeline sets: uniform, where a solver takes one."""
    takes_grid = isinstance(scheduler, FlowMatchHeunScheduler) or not isinstance(scheduler, OWN_GRID)
    if takes_grid:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)


def error_of_solver(scheduler: SchedulerMixin, steps: int, field: Gaussian | Mixture, noise: torch.Tensor) -> float:
    """Root mean square distance from the exact end points."""
    set_grid(scheduler, steps)
    end = integrate(scheduler, field.velocity, noise)
    return (end - field.flow(noise, scheduler.sigmas[0].item())).square().mean().sqrt().item()


def error_of_sde(steps: int, field: Gaussian, uniform: bool) -> float:
    """Distance of the covariance at the end from that of the data, in the Frobenius norm."""
    scheduler = FlowMatchEulerMaruyamaScheduler(path=field.path)
    if uniform:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    _, covariance = sde_moments(scheduler, field)
    return torch.linalg.norm(covariance - field.covariance).item()


def measured(name: str, problem: str, path: str, errors: list[float]) -> dict[str, Any]:
    """A row of the report."""
    return {
        "solver": name,
        "problem": problem,
        "path": path,
        "errors": errors,
        "order": fit_order(STEPS, errors),
        "last_order": fit_order(STEPS[-2:], errors[-2:]),
    }


def report_of() -> dict[str, Any]:
    """Errors and orders of all solvers, problems and paths."""
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solvers, sde = [], []
    for path in PATHS:
        fields = {"Gaussian": full_gaussian(path), "mixture": Mixture.three_modes(path)}
        for problem, field in fields.items():
            for name, build in SOLVERS.items():
                errors = [error_of_solver(build(), steps, field, noise) for steps in STEPS]
                solvers.append(measured(name, problem, path, errors))
        for grid, uniform in (("its own grid", False), ("uniform grid", True)):
            errors = [error_of_sde(steps, fields["Gaussian"], uniform) for steps in STEPS]
            sde.append(measured(f"FlowMatchEulerMaruyamaScheduler, {grid}", "Gaussian", path, errors))
    return {
        "command": COMMAND,
        "machine": machine("diffusers", "numpy"),
        "steps": list(STEPS),
        "solvers": solvers,
        "sde": sde,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""

    def rows(measurements: list[dict[str, Any]]) -> list[list[str]]:
        return [
            [
                row["solver"],
                *(f"{error:.1e}" for error in row["errors"]),
                f"{row['order']:.2f}",
                f"{row['last_order']:.2f}",
            ]
            for row in measurements
        ]

    head = ["solver", *(f"{steps} steps" for steps in report["steps"]), "order", "last doubling"]
    lines = [
        "# How fast the solvers approach the exact end of a flow",
        "",
        "Root mean square error of the end points where they are known in closed form, on data of standard deviation "
        "about 1. The order is the fitted slope of the error in the number of steps. A Heun step takes two "
        "evaluations of the model, every other step one. diffusers' solvers keep their state in float32. UniPC and "
        "DPM-Solver++ begin a little below t = 1 and are compared with the flow from there; the distance from "
        "beginning at 1 comes on top.",
        "",
    ]
    for path in PATHS:
        for problem in ("Gaussian", "mixture"):
            chosen = [row for row in report["solvers"] if (row["path"], row["problem"]) == (path, problem)]
            lines += [f"## {problem.capitalize()}, {path} path", "", *table(head, rows(chosen))]
    lines += [
        "## The SDE",
        "",
        "Error of the covariance, computed from the steps themselves. Its own grid ends with a step from t = 0.04 to "
        "0 however many there are, and keeps that step's error; a uniform grid does not.",
        "",
    ]
    for path in PATHS:
        chosen = [row for row in report["sde"] if row["path"] == path]
        lines += [f"### {path.capitalize()} path", "", *table(head, rows(chosen))]
    lines += [f"Written by `{report['command']}` on {machine_line(report['machine'])}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    args = parser.parse_args()
    report = report_of()
    write_results(args.results_dir, "solver_order", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
