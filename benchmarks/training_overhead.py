"""What the training script itself costs: the share of a step that is not forward, backward or optimiser.

The script's own `TokenizerTraining` runs on the CPU, where every call returns when its work is done, with clocks put
around its calls from outside. A step lasts from the end of one to the end of the next. Of it,

- forward is the call of the objective (tokenizer, teachers, LPIPS, the adversarial term) and of the discriminator's,
- backward is `Tensor.backward` of both losses,
- optimiser is `step` and `zero_grad` of both optimisers,

and everything else is the script's own: waiting for the loader, making a batch and its keyed draws, clipping, the
decision about the step, the moving average, averaging and reporting terms to log, progress line and TensorBoard (here
in *every* step, not every fiftieth), seeds, schedules and signals. Checkpoints and validation are not part of a step.

    python -m benchmarks.training_overhead

writes `training_overhead.json` and `.md`.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from maetok_hf.data import export_mnist
from maetok_hf.data.loader import SlotLoader
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results
from .training_cost import PEAK_FLOPS, SHARE, UTILIZATION, per_image
from .training_step import RECIPES, num_bytes, random_networks


COMMAND = "python -m benchmarks.training_overhead"
NETWORK = ("forward", "backward", "optimiser")
# what the host does, and what a device does at the speed of its memory
HOST = ("loading", "batch and draws", "decision", "reporting", "the rest")
DEVICE = ("clipping", "moving average")
OWN = HOST + DEVICE
LIMIT_PERCENT = 5.0

# A step of 100 ms is what a GPU makes of the images that fit in it at the assumed share of its peak.
GPU_STEP_SECONDS = 0.1
BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12}  # bytes per second, SXM with 80 GB, data sheets
BANDWIDTH_SHARE = 0.8
# Passes over 4 bytes per parameter. The average reads itself and the weight and writes the difference, then reads both
# and writes itself; clipping reads the gradients for their norm, then reads and writes them.
PASSES = {"moving average": 6, "clipping": 3}


class Done(Exception):
    """Enough steps were measured."""


class Times(NamedTuple):
    """Seconds by the clock, and seconds of all processors that work for this process."""

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return Times(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: "Times") -> "Times":
        return Times(self.wall - other.wall, self.processor - other.processor)


def now() -> Times:
    return Times(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Case:
    """
    A training to measure.

    Args:
        name (`str`): What it is, for the table.
        recipe (`str`): The recipe.
        overrides (`dict`): Values that replace the recipe's.
        options (`dict`): Options of the script.
        warmup, steps (`int`): Steps before the clocks count, and steps that count.
    """

    name: str
    recipe: str
    overrides: dict[str, Any]
    options: dict[str, Any]
    warmup: int
    steps: int


CASES = (
    Case(
        "ViT-B, 256 x 256, all losses, batch 2",
        "maetok-b-128-256",
        {"total_batch_size": 2, "adversarial_start_step": 0},
        {"mixed_precision": "bf16", "dataloader_num_workers": 1},
        2,
        8,
    ),
    Case("demonstration, batch 32", "demo-tokenizer", {}, {"mixed_precision": "no"}, 50, 200),
    Case(
        "demonstration, batch 32, 1 data worker",
        "demo-tokenizer",
        {},
        {"mixed_precision": "no", "dataloader_num_workers": 1},
        50,
        200,
    ),
)


class Clock:
    """Wall and processor seconds of each step by name; of calls within calls only the outermost counts."""

    def __init__(self):
        self.steps: list[dict[str, Times]] = []
        self._running: dict[str, Times] = {}
        self._inside = False
        self._began = now()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, whose time goes to `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, now()
            try:
                return function(*args, **kwargs)
            finally:
                self._running[name] = self._running.get(name, Times()) + (now() - began)
                self._inside = False

        return call

    def end_step(self) -> None:
        """Note a step: what was timed, and all of it as `step`."""
        ended = now()
        self.steps.append(self._running | {"step": ended - self._began})
        self._running, self._began = {}, ended


def load_script() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_maetok", ROOT / "examples" / "train_maetok.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_clocks(script: ModuleType, training: Any, clock: Clock, num_steps: int) -> None:
    """Time the calls of a training whose run has begun, and end it after some steps."""

    def wrap(owner: Any, method: str, name: str) -> None:
        setattr(owner, method, clock.timed(name, getattr(owner, method)))

    optimizers = [training.optimizer]
    wrap(training.model, "forward", "forward")
    if training.discriminator is not None:
        wrap(training.discriminator, "forward", "forward")
        optimizers.append(training.discriminator_optimizer)
    for optimizer in optimizers:
        wrap(optimizer, "step", "optimiser")
        wrap(optimizer, "zero_grad", "optimiser")
    wrap(training, "make_inputs", "batch and draws")
    wrap(training, "adversarial_draws", "batch and draws")
    wrap(script, "clip_grad_norm_", "clipping")
    wrap(training.run, "admit", "decision")
    wrap(training.ema, "step", "moving average")
    for method in ("add", "advance"):
        wrap(training.run.monitor, method, "averages of terms")
    wrap(training.run.monitor, "report", "report")
    wrap(training.run.trackers, "log", "report")

    leave_if_asked = training.run.leave_if_asked

    def leave(step: int) -> None:
        leave_if_asked(step)
        clock.end_step()
        if len(clock.steps) == num_steps:
            raise Done

    training.run.leave_if_asked = leave


def run_case(case: Case, data: str, num_threads: int) -> dict[str, Any]:
    """Steps of a case in seconds, by part; run it in a process of its own."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(num_threads)
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"{case.recipe}.yaml", case.overrides)
    script, clock = load_script(), Clock()
    iterate = SlotLoader.__iter__

    def timed_batches(loader: SlotLoader) -> Iterator[dict]:
        batches = iterate(loader)
        take = clock.timed("loading", lambda: next(batches))
        while True:
            yield take()

    with tempfile.TemporaryDirectory() as folder:
        options = TokenizerRunOptions(
            output_dir=folder, dataset_name=data, cache_dir=folder, logging_steps=1, **case.options
        )
        with random_networks():
            training = script.TokenizerTraining(recipe, options)
        begin = training.begin

        def begin_with_clocks() -> int:
            first_step = begin()
            put_clocks(script, training, clock, case.warmup + case.steps)
            return first_step

        training.begin = begin_with_clocks
        backward = clock.timed("backward", torch.Tensor.backward)
        with patch.object(torch.Tensor, "backward", backward), patch.object(SlotLoader, "__iter__", timed_batches):
            try:
                training.train()
            except Done:
                training.run.end()
                training.run.close()
    return {
        "seconds": clock.steps[case.warmup :],
        "batch_size": recipe.total_batch_size,
        "averaged_bytes": num_bytes(training.ema.shadow_params),
        "clipped_bytes": num_bytes(training.parameters),
    }
