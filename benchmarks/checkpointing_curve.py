"""Time against memory of gradient checkpointing, from none of the transformer blocks to all of them.

Memory and operations are computed, for a whole training step of the published tokenizer and of generators on cached
latents: memory as `training_memory` counts it, operations (forward, backward and what is recomputed) as
`training_cost` does. Seconds of a step are measured where the sizes fit: in every round each share has its turn, on
the same weights, and times are compared with that of the same round without checkpointing.

    python -m benchmarks.checkpointing_curve

writes `checkpointing_curve.json`, `.md` and `.png`; `--num_rounds 0` measures nothing.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from maetok_hf.training.generator_parts import make_flow_objective, make_transformer
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.optim import clip_gradients, create_ema
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe

from .machine import RESULTS, machine, machine_line, table, write_results
from .training_cost import count
from .training_memory import CARDS, MARGIN, ComputedMemory
from .training_step import RECIPES, TrainingStep, allocate, read_recipe, set_values


if TYPE_CHECKING:
    from matplotlib.figure import Figure


COMMAND = "python -m benchmarks.checkpointing_curve"
NAME = "checkpointing_curve"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LATENT_SHAPE, NUM_CLASSES, PATCH_SIZE = (128, 32), 1000, 16
# By name of the case: recipe, and the two batches whose difference is what an image takes
CASES = {
    "tokenizer, 256 x 256, all losses": ("maetok-b-128-256", (32, 64)),
    "SiT-B, 128 x 32": ("sit-b-256", (128, 256)),
    "SiT-XL, 128 x 32": ("sit-xl-256", (128, 256)),
}
# By device: batches of the measured steps
MEASURED = {
    "cpu": {"SiT-B, 128 x 32": 8},
    "cuda": {"tokenizer, 256 x 256, all losses": 32, "SiT-B, 128 x 32": 256, "SiT-XL, 128 x 32": 64},
}
WARMUP, NUM_ROUNDS = 1, 9


class GeneratorStep:
    """
    A step of `examples/train_sit.py` on cached latents, without its data, processes and reports: what
    [`TrainingStep`] is to the tokenizer.

    Args:
        recipe ([`SiTRecipe`]): The recipe, without an alignment.
    """

    def __init__(self, recipe: SiTRecipe):
        self.recipe = recipe
        with torch.device("meta"):
            self.transformer = make_transformer(recipe, LATENT_SHAPE, NUM_CLASSES, 0)
            self.objective = make_flow_objective(recipe, self.transformer, PATCH_SIZE, 0)
        self.objective.train()

    def allocate(self, device: str, random_weights: bool = False) -> "GeneratorStep":
        """
        Give everything memory, and make the optimiser and the moving average.

        Args:
            device (`str`): Where it computes from now on, in bfloat16 by autocast.
            random_weights (`bool`, *optional*, defaults to `False`): As those of [`TrainingStep.allocate`].
        """
        self.device = device
        allocate(self.objective, device)
        if random_weights:
            set_values(self.objective)
        self.optimizer = self.recipe.make_optimizer(self.objective)
        self.ema = create_ema(self.transformer, self.recipe.ema_decay)
        return self

    def inputs(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """A batch as the objective takes it: latents, labels, draws of the time and noise."""
        latents = torch.zeros(batch_size, *LATENT_SHAPE, device=self.device)
        labels = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        draw = torch.full((batch_size,), 0.5, device=self.device)
        return latents, labels, draw, torch.ones_like(latents)

    def random_inputs(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """The like with values."""
        generator = torch.Generator().manual_seed(1)
        latents, labels, draw, noise = self.inputs(batch_size)
        for tensor in (latents, noise):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        labels.copy_(torch.randint(NUM_CLASSES, labels.shape, generator=generator))
        draw.copy_(torch.rand(draw.shape, generator=generator))
        return latents, labels, draw, noise

    def passes(self, batch_size: int, inputs: Sequence[torch.Tensor] | None = None) -> None:
        """
        Forward and backward passes of one batch.

        Args:
            batch_size (`int`): Images.
            inputs (`Sequence[torch.Tensor]`, *optional*): The batch; `None` for constants.
        """
        inputs = self.inputs(batch_size) if inputs is None else inputs
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.objective(*inputs)["loss"]
        loss.backward()

    def __call__(self, batch_size: int, inputs: Sequence[torch.Tensor] | None = None) -> None:
        """A whole step, also the optimiser's and the moving average's part."""
        self.passes(batch_size, inputs)
        clip_gradients(self.transformer.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.transformer.parameters())


def make_step(recipe: str) -> tuple[TrainingStep | GeneratorStep, tuple[int, ...]]:
    """The step of a recipe, without memory, and what it is called with after the number of images."""
    if recipe.startswith("maetok"):
        tokenizer = read_recipe(recipe)[0]
        return TrainingStep(tokenizer, tokenizer), (tokenizer.resolution,)
    return GeneratorStep(load_recipe(SiTRecipe, RECIPES / f"{recipe}.yaml")), ()


def operations(recipe: str) -> dict[float, int]:
    """Floating-point operations of the passes of one image, by share."""
    step, arguments = make_step(recipe)
    found = {}
    with FakeTensorMode():
        step.allocate("cpu")
        for share in SHARES:
            enable_gradient_checkpointing(step.objective, share)
            found[share] = count(functools.partial(step.passes, 1, *arguments))
    return found


def compute(recipe: str, batches: tuple[int, int]) -> list[dict[str, Any]]:
    """
    Memory and operations of a recipe's step by share.

    Args:
        recipe (`str`): Name of the recipe.
        batches (`tuple[int, int]`): Images of two batches. What an image takes is the slope between their peaks.

    Returns:
        `list[dict]`: For each of `SHARES`, in plain types.
    """
    flops = operations(recipe)
    step, arguments = make_step(recipe)
    memory, rows = ComputedMemory(step, *arguments), []
    for share in SHARES:
        enable_gradient_checkpointing(step.objective, share)
        low, high = (memory.peak(batch) for batch in batches)
        slope = (high - low) / (batches[1] - batches[0])
        rows.append(
            {
                "share": share,
                "between_steps_bytes": memory.between_steps(),
                "peak_bytes": {str(batch): peak for batch, peak in zip(batches, (low, high), strict=True)},
                "bytes_per_image": slope,
                "largest_batch": {
                    card: int((size * (1 - MARGIN) - low) / slope + batches[0]) for card, size in CARDS.items()
                },
                "flops_per_image": flops[share],
            }
        )
        print(f"{recipe}: {rows[-1]}", flush=True)
    return rows


def seconds_of(step: TrainingStep | GeneratorStep, batch_size: int, arguments: Sequence[int], inputs: Any) -> float:
    """Seconds of one step of a batch."""
    wait = torch.cuda.synchronize if step.device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    step(batch_size, *arguments, inputs=inputs)
    wait()
    return time.perf_counter() - begin


def measure(recipe: str, batch_size: int, device: str, num_rounds: int) -> dict[str, Any]:
    """
    Seconds of a recipe's step by share, and on a CUDA device its peak of memory.

    Args:
        recipe (`str`): Name of the recipe.
        batch_size (`int`): Images.
        device (`str`): `"cpu"` or `"cuda"`.
        num_rounds (`int`): Rounds; in each, every share has one step.

    Returns:
        `dict`: In plain types.
    """
    step, arguments = make_step(recipe)
    step.allocate(device, random_weights=True)
    torch.manual_seed(0)
    inputs = step.random_inputs(batch_size, *arguments)
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    peaks = {}
    for number in range(WARMUP + num_rounds):
        for share in SHARES if number % 2 else reversed(SHARES):
            enable_gradient_checkpointing(step.objective, share)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds_of(step, batch_size, arguments, inputs)
            if number >= WARMUP:
                seconds[share].append(taken)
            if device == "cuda":
                peaks[share] = torch.cuda.max_memory_allocated()
    rows = []
    for share in SHARES:
        ratios = [own / base for own, base in zip(seconds[share], seconds[0.0], strict=True)]
        median, ratio = statistics.median(seconds[share]), statistics.median(ratios)
        rows.append({"share": share, "seconds": median, "times_none": ratio, "peak_bytes": peaks.get(share)})
        print(f"{recipe}, batch {batch_size}: {rows[-1]}", flush=True)
    return {"batch_size": batch_size, "device": device, "num_rounds": num_rounds, "rows": rows}


def report_of(num_rounds: int) -> dict[str, Any]:
    """Everything about the curves, in plain types."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = MEASURED[device] if num_rounds else {}
    measured = {
        name: measure(CASES[name][0], batch, device, num_rounds) for name, batch in batches.items() if name in CASES
    }
    return {
        "command": COMMAND + ("" if num_rounds == NUM_ROUNDS else f" --num_rounds {num_rounds}"),
        "machine": machine("diffusers"),
        "num_threads": torch.get_num_threads(),
        "computed": {name: compute(recipe, batches) for name, (recipe, batches) in CASES.items()},
        "measured": measured,
    }


def curves(report: dict[str, Any]) -> dict[str, list[tuple[float, float, float, float | None]]]:
    """
    Points of the curves: by case, for each share, memory per image, operations and measured time, all as multiples of
    those without checkpointing.
    """
    found = {}
    for name, rows in report["computed"].items():
        own = report["measured"].get(name)
        times = [row["times_none"] for row in own["rows"]] if own else [None] * len(rows)
        none = rows[0]
        found[name] = [
            (
                row["share"],
                row["bytes_per_image"] / none["bytes_per_image"],
                row["flops_per_image"] / none["flops_per_image"],
                taken,
            )
            for row, taken in zip(rows, times, strict=True)
        ]
    return found


def draw(report: dict[str, Any]) -> "Figure":
    """Operations, and times where there are some, against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves(report).items()):
        shares, memory, flops, times = zip(*points, strict=True)
        axes.plot(memory, flops, marker="o", color=f"C{number}", label=f"{name}: operations, computed")
        beside = {"xytext": (6, 4) if number % 2 else (-6, -10), "ha": "left" if number % 2 else "right"}
        for share, x, y in zip(shares, memory, flops, strict=True):
            axes.annotate(f"{share:g}", (x, y), textcoords="offset points", fontsize="x-small", **beside)
        if times[0] is not None:
            where = report["measured"][name]["device"]
            label = f"{name}: seconds, measured ({where})"
            axes.plot(memory, times, marker="x", linestyle="--", color=f"C{number}", label=label)
    axes.set_xlabel("memory that an image takes, times that without checkpointing")
    axes.set_ylabel("operations or time of a step, times without")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def write_picture(folder: Path, report: dict[str, Any]) -> None:
    """Write the picture, which appears when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{NAME}.png"
    # without the version of matplotlib, which is no part of the result
    draw(report).savefig(partial, dpi=120, format="png", metadata={"Software": None})
    os.replace(partial, folder / f"{NAME}.png")


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    rows = []
    for name, points in curves(report).items():
        for row, (share, memory, flops, _) in zip(report["computed"][name], points, strict=True):
            rows.append(
                [
                    name,
                    f"{share:g}",
                    f"{row['bytes_per_image'] / 1e6:.0f}",
                    f"{memory:.2f}",
                    f"{row['flops_per_image'] / 1e9:.0f}",
                    f"{flops:.2f}",
                    *(str(row["largest_batch"][card]) for card in CARDS),
                ]
            )
    head = ["step", "share", "memory per image (MB)", "times that of 0", "GFLOP per image", "times those of 0"]
    head += [f"batch for {card}" for card in CARDS]
    timed = []
    for name, own in report["measured"].items():
        for row in own["rows"]:
            peak = row["peak_bytes"]
            timed.append(
                [
                    f"{name}, batch {own['batch_size']}, {own['device']}",
                    f"{row['share']:g}",
                    f"{row['seconds']:.3f}",
                    f"{row['times_none']:.2f}",
                    "" if peak is None else f"{peak / 1e9:.1f}",
                ]
            )
    seconds = ["Not measured.", ""]
    if timed:
        rounds = max(own["num_rounds"] for own in report["measured"].values())
        seconds = [
            f"Medians of {rounds} whole steps, forward passes under bfloat16 autocast, {report['num_threads']} CPU "
            "threads; in each round every share has its turn, and ratios are formed within rounds.",
            "",
            *table(["step", "share", "seconds", "times that of 0", "peak (GB)"], timed),
        ]
    return "\n".join(
        [
            "# Time against memory of gradient checkpointing",
            "",
            "`--gradient_checkpointing_share` is the share of the transformer blocks, evenly spread over each stack, "
            "whose activations are computed again in the backward pass; the result is the same bit for bit.",
            "",
            f"![Operations of a step against the memory that an image takes, a point for each share.]({NAME}.png)",
            "",
            "## Memory and operations: computed, not measured",
            "",
            "`memory per image` is what one more image adds to the peak of a whole step; `GFLOP per image` are "
            "forward, backward and recomputed ones, with teachers, LPIPS and discriminator for the tokenizer. The "
            f"batches are those whose peak, by a line through the computed peaks of two batches, leaves "
            f"{100 * MARGIN:.0f} % of the card. What else is assumed is in "
            "[training_memory](training_memory.md) and [training_cost](training_cost.md).",
            "",
            *table(head, rows),
            "## Seconds of a step",
            "",
            *seconds,
            f"Written by `{report['command']}` on {machine_line(report['machine'])}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument(
        "--num_rounds", type=int, default=NUM_ROUNDS, help="Measured steps for each share; 0 measures nothing."
    )
    args = parser.parse_args()
    if args.num_rounds < 0:
        parser.error(f"--num_rounds must be 0 or more, got {args.num_rounds}.")
    report = report_of(args.num_rounds)
    write_picture(args.results_dir, report)
    write_results(args.results_dir, NAME, report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
