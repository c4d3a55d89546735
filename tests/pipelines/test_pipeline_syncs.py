"""Nothing in a run asks the device for a number between the first step and the last."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pipelines.helpers import SCHEDULERS, generators, tiny_pipeline


class ReadNumbers(TorchDispatchMode):
    """Types of the tensors whose values Python read: each would wait for a device."""

    def __init__(self):
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


METHODS = [{}, {"guidance_transformer": {}}, {"transformer": {"temperature_embedding": True}}]


@pytest.mark.parametrize("method", METHODS, ids=["cfg", "autoguidance", "gft"])
@pytest.mark.parametrize("scheduler", ["sde", "euler"])
def test_steps_read_no_number_of_the_solvers_state(scheduler, method):
    pipe = tiny_pipeline(scheduler, **method)
    counts = []
    for steps in (3, 9):
        with ReadNumbers() as read:
            pipe([0, 1], 1.9, (0.0, 0.75), steps, generator=generators(0, 1), output_type="latent")
        # the grid of our scheduler lies on the CPU in float64, whatever the device
        counts.append(sum(dtype != torch.float64 for dtype in read.dtypes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scheduler", ["sde", "heun"])
def test_grids_that_steps_read_stay_on_the_cpu(scheduler):
    grid = SCHEDULERS[scheduler]()
    grid.set_timesteps(4, device="meta")
    assert grid.sigmas.device.type == "cpu" and grid.timesteps.device.type == "meta"


def test_a_number_that_is_read_is_seen():
    with ReadNumbers() as read:
        assert torch.ones(2).sum() > 1
    assert read.dtypes == [torch.bool]
