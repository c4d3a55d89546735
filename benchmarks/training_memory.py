"""Peak memory of a training step of the published tokenizer, and the batches that fit cards of 24 and 80 GB.

On a CUDA device the peak is measured (`torch.cuda.max_memory_allocated`). Without one it is computed: the step runs on
tensors without values (torch's `FakeTensorMode`), and every storage that an operation makes counts from then until it
is released. What that leaves out is named in the result.

    python -m benchmarks.training_memory

writes `training_memory.json` and `.md`.
"""

import argparse
import bisect
import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, machine, machine_line, table, write_results
from .training_step import TrainingStep, keys_as_on_a_gpu, num_bytes, read_recipe


COMMAND = "python -m benchmarks.training_memory"
RECIPES = {256: "maetok-b-128-256", 512: "maetok-b-128-512"}
# decimal gigabytes: a card has a little more, which is part of the margin
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
MARGIN = 0.1
MAX_BATCH = 4096
SHOWN_BATCHES = (1, 8)
# their kernels, on every device, make the unreduced loss and shrink it to a scalar, which keeps all of its storage;
# fake tensors show the scalar's alone
SHRINKING_LOSSES = (torch.ops.aten.mse_loss.default, torch.ops.aten.smooth_l1_loss.default)


class LiveBytes(TorchDispatchMode):
    """
    Bytes of the storages that operations have made while this mode is active and that are still alive.

    Attributes:
        live (`int`): Now.
        peak (`int`): The most so far; set it to `live` to begin anew.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        least = args[0].numel() * result.element_size() if func in SHRINKING_LOSSES else 0
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage(), least)
        return result

    def _note(self, storage: torch.UntypedStorage, least: int) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = max(storage.nbytes(), least)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def tokenizer_only(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """The recipe with the pixels' squared error as its only loss."""
    return dataclasses.replace(recipe, auxiliary_targets=[], perceptual_weight=0.0, adversarial_weight=0.0)


class ComputedMemory:
    """
    Memory of training on a device that is not there.

    Args:
        step ([`TrainingStep`] or its like): The step, to which no memory is given yet.
        arguments (`Any`): What it is called with after the number of images: the resolution.
    """

    def __init__(self, step: Any, *arguments: Any):
        self.step, self.arguments = step, arguments
        self.modes = FakeTensorMode(), LiveBytes()
        with self._entered():
            self.step.allocate("cpu")
            self.step(1, *arguments)  # which makes the moments

    @contextlib.contextmanager
    def _entered(self) -> Iterator[LiveBytes]:
        with keys_as_on_a_gpu(), self.modes[0], self.modes[1] as memory:
            yield memory

    def between_steps(self) -> int:
        """Bytes that are there all the time."""
        return self.modes[1].live

    def peak(self, batch_size: int) -> float:
        """The most bytes that are there at a time during a step."""
        with self._entered() as memory:
            memory.peak = memory.live
            self.step(batch_size, *self.arguments)
            return memory.peak


class MeasuredMemory:
    """The same on the CUDA device of this process; see [`ComputedMemory`]."""

    def __init__(self, step: Any, *arguments: Any):
        self.step, self.arguments = step.allocate("cuda"), arguments
        self.step(1, *arguments)

    def between_steps(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self, batch_size: int) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            self.step(batch_size, *self.arguments)
        except torch.cuda.OutOfMemoryError:
            for optimizer in self.step.optimizers:
                optimizer.zero_grad()
            return math.inf
        return torch.cuda.max_memory_allocated()


def parts_between_steps(step: TrainingStep) -> dict[str, int]:
    """Bytes of what is kept between steps, by kind."""
    trained = step.objective.trainable_parameters()
    if step.discriminator is not None:
        trained = [*trained, *step.discriminator.parameters()]
    frozen = [parameter for network in step.frozen for parameter in network.parameters()]
    return {
        "trained weights": num_bytes(trained),
        "moments of AdamW": 2 * num_bytes(trained),
        "moving average": num_bytes(step.ema.shadow_params),
        "frozen networks": num_bytes(frozen),
        "gradients, in a step": num_bytes(trained),
    }


def largest_batch(peak: Callable[[int], float], limit: float) -> int:
    """The largest batch whose peak does not exceed a limit."""
    return bisect.bisect_right(range(1, MAX_BATCH + 1), limit, key=peak)


def measure(recipe: TokenizerRecipe, gradient_checkpointing: bool) -> dict[str, Any]:
    """Peak memory of a step, and the batches that fit the cards."""
    step = TrainingStep(recipe, recipe, checkpointing_share=float(gradient_checkpointing))
    memory = (MeasuredMemory if torch.cuda.is_available() else ComputedMemory)(step, recipe.resolution)
    peak = functools.lru_cache(maxsize=None)(memory.peak)
    batches = {card: largest_batch(peak, size * (1 - MARGIN)) for card, size in CARDS.items()}
    low, high = (batches[card] for card in CARDS)
    return {
        "between_steps_bytes": memory.between_steps(),
        "parts_bytes": parts_between_steps(memory.step),
        "peak_bytes": {str(batch): peak(batch) for batch in SHOWN_BATCHES},
        "bytes_per_image": (peak(high) - peak(low)) / (high - low),
        "largest_batch": batches,
        "peak_bytes_at_largest_batch": {card: peak(batch) for card, batch in batches.items()},
    }


def report_of(resolutions: list[int]) -> dict[str, Any]:
    """Everything about memory, in plain types."""
    measured, rows = torch.cuda.is_available(), []
    for resolution in resolutions:
        full = read_recipe(RECIPES[resolution])[0]
        for losses, recipe in (("full objective", full), ("tokenizer only", tokenizer_only(full))):
            for checkpointing in (False, True):
                row = {"recipe": RECIPES[resolution], "losses": losses, "gradient_checkpointing": checkpointing}
                rows.append(row | measure(recipe, checkpointing))
                print(rows[-1], flush=True)
    return {
        "command": COMMAND,
        "kind": "measured" if measured else "computed",
        "assumptions": [
            "one process; weights, gradients, moments and the moving average in float32, forward passes under "
            "bfloat16 autocast; the teachers' weights in bfloat16, those of LPIPS and the discriminator in float32",
            f"a batch fits if the peak is at most {100 * (1 - MARGIN):.0f} % of the card's (decimal) gigabytes: the "
            f"other {100 * MARGIN:.0f} % are for what the count leaves out: the CUDA context, workspaces of libraries "
            "and the fragments of the allocator",
            "DDP keeps a second copy of the gradients of the tokenizer and its auxiliary decoders; FSDP2 keeps a "
            "share of all but activations and frozen networks",
            *([] if measured else ["the tensors counted are those of the CPU's kernels: a CUDA device has others"]),
        ],
        "machine": machine("transformers", "timm", "lpips"),
        "rows": rows,
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    head = ["recipe", "losses", "checkpointing", "between steps (GB)"]
    head += [*(f"peak, batch {batch} (GB)" for batch in SHOWN_BATCHES), "per image (MB)"]
    head += [f"batch for {card}" for card in CARDS]
    rows = [
        [
            row["recipe"],
            row["losses"],
            "yes" if row["gradient_checkpointing"] else "no",
            f"{row['between_steps_bytes'] / 1e9:.2f}",
            *(f"{row['peak_bytes'][str(batch)] / 1e9:.1f}" for batch in SHOWN_BATCHES),
            f"{row['bytes_per_image'] / 1e6:.0f}",
            *(str(row["largest_batch"][card]) for card in CARDS),
        ]
        for row in report["rows"]
    ]
    kinds = [row for row in report["rows"] if not row["gradient_checkpointing"]]
    parts = [
        [row["recipe"], row["losses"], *(f"{value / 1e9:.2f}" for value in row["parts_bytes"].values())]
        for row in kinds
    ]
    how = "Measured" if report["kind"] == "measured" else "Computed, not measured"
    return "\n".join(
        [
            "# Peak memory of a training step of the published tokenizer",
            "",
            f"{how}: the most memory of tensors at a time in a whole step (forward, backward, clipping, optimisers, "
            "moving average). `per image` is what one more image takes between the batches for the two cards.",
            "",
            *table(head, rows),
            "## What is there whatever the batch (GB)",
            "",
            *table(["recipe", "losses", *kinds[0]["parts_bytes"]], parts),
            "## What is assumed",
            "",
            *(f"- {text}" for text in report["assumptions"]),
            f"- {machine_line(report['machine'])}",
            "",
            "```",
            report["command"],
            "```",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--resolutions", nargs="+", type=int, default=list(RECIPES), choices=RECIPES)
    args = parser.parse_args()
    report = report_of(args.resolutions)
    write_results(args.results_dir, "training_memory", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
