"""Nothing in a run asks the device for a number between the first step and the last."""

import contextlib
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import SchedulerMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tests.pipelines.helpers import SCHEDULERS, generators, tiny_pipeline


# Their `sigmas` lie on the CPU whatever the device, for steps to read: our SDE does, and diffusers' code of Heun.
GRID_ON_CPU = ["sde", "heun"]
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
METHODS_THAT_READ = ("tolist", "numpy", "__array__", "cpu")  # on a CPU these are no operations


class ReadNumbers(TorchDispatchMode):
    """Types of the tensors whose values Python read, each of which would wait for a device; what was computed from a
    scheduler's `sigmas` alone, since they were set, is left out if `grid_of` names the scheduler."""

    def __init__(self, grid_of: SchedulerMixin | None = None):
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.grid_of = grid_of
        self.on_cpu = WeakTensorKeyDictionary()
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        for name in METHODS_THAT_READ:
            self.patches.enter_context(patch.object(torch.Tensor, name, self._noting(getattr(torch.Tensor, name))))
        return super().__enter__()

    def __exit__(self, *exception):
        self.patches.close()
        return super().__exit__(*exception)

    def _noting(self, method):
        def noting(tensor, *args, **kwargs):
            if tensor not in self.on_cpu:
                self.dtypes.append(tensor.dtype)
            return method(tensor, *args, **kwargs)

        return noting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.grid_of is not None:
            self.on_cpu[self.grid_of.sigmas] = True
        inputs = self._tensors((args, kwargs))
        outputs = function(*args, **(kwargs or {}))
        if not inputs or not all(tensor in self.on_cpu for tensor in inputs):
            masked = function is torch.ops.aten.index.Tensor and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if function in READS or masked:
                self.dtypes.append(args[0].dtype)
        else:
            self.on_cpu.update(dict.fromkeys(self._tensors(outputs), True))
        return outputs

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


GUIDANCE = [{}, {"guidance_transformer": {}}, {"transformer": {"temperature_embedding": True}}]


@pytest.mark.parametrize("method", GUIDANCE, ids=["cfg", "autoguidance", "gft"])
@pytest.mark.parametrize("scheduler", ["sde", "heun", "euler", "unipc", "dpm"])
def test_steps_read_no_number_of_the_solvers_state(scheduler, method):
    pipe = tiny_pipeline(scheduler, **method)
    counts = []
    for steps in (3, 9):
        with ReadNumbers(pipe.scheduler if scheduler in GRID_ON_CPU else None) as read:
            pipe([0, 1], 1.9, (0.0, 0.75), steps, generator=generators(0, 1), output_type="latent")
        counts.append(len(read.dtypes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scheduler", GRID_ON_CPU)
def test_grids_that_steps_read_stay_on_the_cpu(scheduler):
    grid = SCHEDULERS[scheduler]()
    grid.set_timesteps(4, device="meta")
    assert grid.sigmas.device.type == "cpu" and grid.timesteps.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_that_is_read_is_seen(dtype):
    scheduler, state = SCHEDULERS["sde"](), torch.ones(2, dtype=dtype)
    with ReadNumbers(scheduler) as read:
        assert (1 - scheduler.sigmas[0]).item() == 0  # the grid alone
        assert state.sum().item() == 2 and state.nonzero().shape == (2, 1)
        assert (state * scheduler.sigmas[0]).sum().item() == 2
        assert state[state > 0].tolist() == [1, 1] and torch.equal(state, state) and state.numpy().sum() == 2
        assert state.cpu() is not None and scheduler.sigmas.tolist()
    assert read.dtypes == [dtype] * 8
