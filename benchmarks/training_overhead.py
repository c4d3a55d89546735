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
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from maetok_hf.data import export_mnist
from maetok_hf.data.loader import SlotLoader, WorkerLoader
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results
from .training_cost import PEAK_FLOPS, SHARE, UTILIZATION, per_image
from .training_step import RECIPES, num_bytes, random_networks


COMMAND = "python -m benchmarks.training_overhead"
NUM_PHOTOGRAPHS, JPEG_QUALITY = 256, 90
NETWORK = ("forward", "backward", "optimiser")
OWN = (
    "loading",
    "batch and draws",
    "clipping",
    "decision",
    "moving average",
    "averages of terms",
    "report",
    "the rest",
)
LIMIT_PERCENT = 5.0
LOGGING_STEPS = TokenizerRunOptions.logging_steps  # here every step reports, which gives more reports to measure

# A step of 100 ms on a GPU, with as many images as fit in it at the assumed share of its peak
GPU_STEP_SECONDS = 0.1
BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12}  # bytes per second, SXM with 80 GB, data sheets
BANDWIDTH_SHARE = 0.8
# Passes over the memory of the parameters: clipping reads gradients for their norm, then reads and writes them; the
# average is read with the weights for a difference, and then both for the sum, each of which is written.
PASSES = {"clipping": 3, "moving average": 6}
# what the host does for each image, and what it does for a step
HOST_PER_IMAGE = ("batch and draws",)
HOST_PER_STEP = ("loading", "decision", "averages of terms", "report", "the rest")


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

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time the calls of a method, or of a function of a module."""
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def end_step(self) -> None:
        """Note a step: what was timed, and all of it as `step`."""
        ended = now()
        self.steps.append(self._running | {"step": ended - self._began})
        self._running, self._began = {}, ended


def load_script(name: str) -> ModuleType:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_clocks(script: ModuleType, training: Any, clock: Clock, num_steps: int) -> None:
    """Time the calls of a training whose run has begun, and end it after some steps."""
    clock.wrap(training.model, "forward", "forward")
    put_optimizer_clocks(training.optimizer, clock)
    clock.wrap(training, "make_inputs", "batch and draws")
    clock.wrap(script, "clip_gradients", "clipping")
    clock.wrap(training.run, "admit", "decision")
    clock.wrap(training.ema, "step", "moving average")
    for method in ("add", "advance"):
        clock.wrap(training.run.monitor, method, "averages of terms")
    clock.wrap(training.run.monitor, "report", "report")
    clock.wrap(training.run.trackers, "log", "report")

    leave_if_asked = training.run.leave_if_asked

    def leave(step: int) -> None:
        leave_if_asked(step)
        clock.end_step()
        if len(clock.steps) == num_steps:
            raise Done

    training.run.leave_if_asked = leave


def put_optimizer_clocks(optimizer: Any, clock: Clock) -> None:
    """Time the calls of an optimiser."""
    for method in ("step", "zero_grad"):
        clock.wrap(optimizer, method, "optimiser")


def put_adversarial_clocks(training: Any, clock: Clock) -> None:
    """Time what a tokenizer's training has besides: the discriminator."""
    clock.wrap(training, "adversarial_draws", "batch and draws")
    if training.discriminator is not None:
        clock.wrap(training.discriminator, "forward", "forward")
        put_optimizer_clocks(training.discriminator_optimizer, clock)


def compute_threads(case: Case, num_threads: int) -> int:
    """Threads beside those of data workers: with more, each operation would wait until a worker has had its turn."""
    return max(1, num_threads - case.options.get("dataloader_num_workers", 0))


def prepare_process(case: Case, num_threads: int) -> None:
    """Make this process one in which a script trains on the CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.set_start_method(None, force=True)  # data workers start as they do in the script
    torch.set_num_threads(compute_threads(case, num_threads))


def run_steps(training: Any, clock: Clock, loader_class: type[WorkerLoader], put: Callable[[], None]) -> None:
    """Train until the clocks end it; `put` puts them round the calls once the run has begun."""
    begin, iterate = training.begin, loader_class.__iter__

    def begin_with_clocks() -> int:
        first_step = begin()
        put()
        return first_step

    def timed_batches(loader: WorkerLoader) -> Iterator[dict]:
        batches = iterate(loader)
        take = clock.timed("loading", lambda: next(batches))
        while True:
            yield take()

    training.begin = begin_with_clocks
    backward = clock.timed("backward", torch.Tensor.backward)
    with patch.object(torch.Tensor, "backward", backward), patch.object(loader_class, "__iter__", timed_batches):
        try:
            training.train()
        except Done:
            training.run.end()
            training.run.close()


def measured(training: Any, clock: Clock, case: Case) -> dict[str, Any]:
    """What a run of a case has shown, in plain types."""
    return {
        "seconds": clock.steps[case.warmup :],
        "batch_size": training.recipe.total_batch_size,
        "averaged_bytes": num_bytes(training.ema.shadow_params),
        "clipped_bytes": num_bytes(training.parameters),
    }


def run_case(case: Case, data: str, num_threads: int) -> dict[str, Any]:
    """Steps of a case in seconds, by part; run it in a process of its own."""
    prepare_process(case, num_threads)
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"{case.recipe}.yaml", case.overrides)
    script, clock = load_script("train_maetok"), Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = TokenizerRunOptions(
            output_dir=folder, dataset_name=data, cache_dir=folder, logging_steps=1, **case.options
        )
        with random_networks():
            training = script.TokenizerTraining(recipe, options)

        def put() -> None:
            put_clocks(script, training, clock, case.warmup + case.steps)
            put_adversarial_clocks(training, clock)

        run_steps(training, clock, SlotLoader, put)
    return measured(training, clock, case)


def shares(step: Mapping[str, Times], kind: str) -> dict[str, float]:
    """Seconds of the parts of a step, a report counted as often as the script makes one, and of `own` and `step`."""
    parts = {name: getattr(step.get(name, Times()), kind) for name in (*NETWORK, *OWN)}
    parts["the rest"] = getattr(step["step"], kind) - sum(parts.values())
    parts["report"] /= LOGGING_STEPS
    own = sum(parts[name] for name in OWN)
    return parts | {"own": own, "step": sum(parts[name] for name in NETWORK) + own}


def summarise(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of all runs of a case."""
    summary = {name: runs[0][name] for name in ("batch_size", "averaged_bytes", "clipped_bytes")}
    summary |= {"name": case.name, "recipe": case.recipe, "overrides": case.overrides, "options": case.options}
    for kind in Times._fields:
        steps = [shares(step, kind) for run in runs for step in run["seconds"]]
        percent = [100 * step["own"] / step["step"] for step in steps]
        quartiles = statistics.quantiles(percent, n=4, method="inclusive")
        summary[kind] = {
            "num_steps": len(steps),
            "milliseconds": {name: 1000 * statistics.median(step[name] for step in steps) for name in steps[0]},
            "own_percent": dict(zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True)),
        }
    return summary


def on_gpu(large: dict[str, Any], small: dict[str, Any], flops_per_image: float) -> dict[str, dict[str, float]]:
    """
    What the script's own work would be of a step of 100 ms on a GPU: computed, not measured.

    Args:
        large (`dict`): Summary of the published tokenizer's case: its batches, draws, loading and parameters.
        small (`dict`): Summary of a case with small tensors, in which work for the step is the host's alone.
        flops_per_image (`float`): Operations of a step for one image.

    Returns:
        `dict`: By GPU, its images per step and the milliseconds and percent of the host's and the GPU's own work. A
        host works while the GPU computes, so its part is an upper bound.
    """
    found = {}
    for name, peak in PEAK_FLOPS.items():
        images = UTILIZATION * peak * GPU_STEP_SECONDS / flops_per_image
        per_image_ms = sum(large["processor"]["milliseconds"][part] for part in HOST_PER_IMAGE) / large["batch_size"]
        host = images * per_image_ms + sum(small["processor"]["milliseconds"][part] for part in HOST_PER_STEP)
        moved = PASSES["clipping"] * large["clipped_bytes"] + PASSES["moving average"] * large["averaged_bytes"]
        device = 1000 * moved / (BANDWIDTH_SHARE * BANDWIDTH[name])
        percent = {"host_percent": host, "device_percent": device}
        scale = 100 / (1000 * GPU_STEP_SECONDS)
        found[name] = {"images": images, "host_milliseconds": host, "device_milliseconds": device}
        found[name] |= {key: value * scale for key, value in percent.items()}
    return found


def prepare_data(folder: Path) -> dict[str, str]:
    """Photographs for the published recipe and the demonstration's digits, by recipe."""
    from .data_loading import make_jpegs, open_parquet

    (folder / "photographs").mkdir()
    open_parquet(make_jpegs(NUM_PHOTOGRAPHS, JPEG_QUALITY), folder / "photographs")
    digits = export_mnist(folder / "digits", seed=0)
    return {"maetok-b-128-256": str(folder / "photographs"), "demo-tokenizer": str(digits)}


def measure(
    cases: Sequence[Case],
    run: Callable[[Case, str, int], dict[str, Any]],
    prepare: Callable[[Path], dict[str, str]],
    num_rounds: int,
    num_threads: int,
) -> list[dict[str, Any]]:
    """Summaries of all cases, which take turns, each time in a new process; `prepare` makes the data by recipe."""
    runs: list[list] = [[] for _ in cases]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        for number in range(num_rounds):
            for case, found in zip(cases, runs, strict=True):
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                    found.append(pool.submit(run, case, data[case.recipe], num_threads).result())
                print(f"round {number + 1} of {case.name}: {summarise(case, found[-1:])}", flush=True)
    return [summarise(case, found) for case, found in zip(cases, runs, strict=True)]


def measured_report(
    command: str,
    cases: Sequence[Case],
    run: Callable[[Case, str, int], dict[str, Any]],
    prepare: Callable[[Path], dict[str, str]],
    num_rounds: int,
    num_threads: int,
) -> dict[str, Any]:
    """The measurements and what they depend on, in plain types; see [`measure`]."""
    loads = [os.getloadavg()[0]]
    found = measure(cases, run, prepare, num_rounds, num_threads)
    loads.append(os.getloadavg()[0])
    return {
        "command": f"{command} --num_rounds {num_rounds} --num_threads {num_threads}",
        "num_threads": num_threads,
        "load_average": [round(load, 2) for load in loads],
        "machine": machine("accelerate", "diffusers", "datasets", "tensorboard"),
        "limit_percent": LIMIT_PERCENT,
        "cases": found,
    }


def report_of(num_rounds: int, num_threads: int) -> dict[str, Any]:
    """Everything about the script's own work, in plain types."""
    report = measured_report(COMMAND, CASES, run_case, prepare_data, num_rounds, num_threads)
    cases, flops = report["cases"], sum(per_image(CASES[0].recipe)[256].values())
    return report | {"of_a_gpu_step": on_gpu(cases[0], cases[-1], flops)}


def share_lines(report: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the share of each case, and the milliseconds of its parts."""
    cases, names = report["cases"], ("step", *NETWORK, "own", *OWN)

    def milliseconds(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"

    def spread(case: dict[str, Any], kind: str) -> str:
        values = case[kind]["own_percent"]
        return f"{values['median']:.1f} ({values['quartile_1']:.1f} to {values['quartile_3']:.1f})"

    def verdict(case: dict[str, Any]) -> str:
        return "yes" if case["processor"]["own_percent"]["median"] < report["limit_percent"] else "no"

    rows = [[case["name"], spread(case, "wall"), spread(case, "processor"), verdict(case)] for case in cases]
    parts = [
        [name, *(milliseconds(case[kind]["milliseconds"][name]) for case in cases for kind in Times._fields)]
        for name in names
    ]
    kinds = {"wall": "clock", "processor": "processor"}
    return [
        "Percent of a step that are not forward, backward or optimiser: median over steps, and quartiles. By the "
        "clock, and by the time of all processors that work for the training's process (without its data "
        "workers), which other jobs on the machine disturb less and by which the last column judges.",
        "",
        *table(
            ["training", "by the clock (%)", "by processor time (%)", f"under {report['limit_percent']:g} %"], rows
        ),
        "## Milliseconds of a step",
        "",
        f"Medians over steps, so parts need not sum to the whole. A report is counted once in {LOGGING_STEPS} "
        "steps, as the script makes it.",
        "",
        *table(["part", *(f"{case['name']}, {kinds[kind]}" for case in cases for kind in Times._fields)], parts),
    ]


def method_lines(report: dict[str, Any], description: str) -> list[str]:
    """Lines of Markdown: how it was measured, by a module's description from its second paragraph to the command."""
    paragraphs = itertools.takewhile(lambda text: not text.startswith(" "), description.split("\n\n")[1:])
    return [
        "## How it was measured",
        "",
        *(line for paragraph in paragraphs for line in (*paragraph.splitlines(), "")),
        f"- {report['num_threads']} threads, of which a data worker has one; other jobs ran on the machine: load "
        f"average {' at the beginning and '.join(map(str, report['load_average']))} at the end",
        f"- {machine_line(report['machine'])}",
        "",
        "```",
        report["command"],
        "```",
    ]


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    gpus = [
        [
            name,
            f"{value['images']:.0f}",
            *(f"{value[f'{side}_milliseconds']:.1f} ({value[f'{side}_percent']:.1f})" for side in ("host", "device")),
        ]
        for name, value in report["of_a_gpu_step"].items()
    ]
    return "\n".join(
        [
            "# What the training script itself costs",
            "",
            *share_lines(report),
            f"## Of a step of {1000 * GPU_STEP_SECONDS:.0f} ms on a GPU",
            "",
            "Computed, not measured. Images are those that a GPU gets done in this time with all losses at 256 x 256, "
            f"at {SHARE} of its dense bfloat16 peak. The host's part is measured here: what it does for each image in "
            "the first training, and what it does for a step in the last, whose tensors are small; it can do that "
            "while the GPU computes. The GPU's part is clipping and the moving average, "
            f"{PASSES['clipping']} and {PASSES['moving average']} passes over the memory of the parameters at "
            f"{100 * BANDWIDTH_SHARE:.0f} % of its bandwidth.",
            "",
            *table(["GPU", "images", "host, ms (%)", "GPU, ms (%)"], gpus),
            *method_lines(report, str(__doc__)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--num_rounds", type=int, default=2, help="Processes for each training.")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads.")
    args = parser.parse_args()
    report = report_of(args.num_rounds, args.num_threads)
    write_results(args.results_dir, "training_overhead", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
