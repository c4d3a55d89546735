"""The committed orders of the solvers: what the code measures, and what the tables say."""

import json

import pytest
import torch

from benchmarks import solver_order
from benchmarks.machine import RESULTS
from tests.schedulers.fields import fit_order, full_gaussian


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "solver_order.json").read_text())


def test_the_order_is_the_slope_of_the_error():
    assert fit_order([8, 16, 32], [3 / 8**2, 3 / 16**2, 3 / 32**2]) == pytest.approx(2)


def test_the_committed_tables_are_those_of_the_committed_numbers(committed):
    assert (RESULTS / "solver_order.md").read_text() == solver_order.to_markdown(committed) + "\n"


@pytest.mark.parametrize("name", solver_order.SOLVERS)
def test_the_committed_errors_are_those_of_the_solvers(name, committed):
    steps = committed["steps"][1]
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = solver_order.error_of_solver(solver_order.SOLVERS[name](), steps, full_gaussian(), noise)
    row = next(row for row in committed["solvers"] if row["solver"] == name)
    assert (row["problem"], row["path"]) == ("Gaussian", "linear")
    assert error == pytest.approx(row["errors"][1], rel=1e-3)


def test_the_committed_errors_of_the_sde_are_those_of_its_steps(committed):
    own_grid, uniform = committed["sde"][:2]
    for row, is_uniform in ((own_grid, False), (uniform, True)):
        error = solver_order.error_of_sde(committed["steps"][1], full_gaussian(), is_uniform)
        assert error == pytest.approx(row["errors"][1], rel=1e-6)
