"""What a run tells while it trains: averaged loss terms in a progress bar and in a log file."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm


LINE_LENGTH = 200  # characters of a line in a log file


class TrainingLog:
    """
    `training_log.jsonl`: one JSON object per line with `step` and values.

    Args:
        path (`str` or `Path`): The file.
        resumed_step (`int`): Steps done so far. Entries of later steps, written after the checkpoint from which the
            run continues, are removed: the log always describes one uninterrupted run.
    """

    def __init__(self, path: str | Path, resumed_step: int):
        self.path = Path(path)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= resumed_step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def last_entry(self) -> dict[str, float | None] | None:
        """The newest entry, `None` if there is none."""
        lines = self._lines()
        return json.loads(lines[-1]) if lines else None

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        # A line without its end was being written when the process was killed.
        return text[: text.rfind("\n") + 1].splitlines()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """
        Append an entry; values that are not finite are written as `null`, which JSON has instead.

        Args:
            step (`int`): Steps done.
            values (`Mapping[str, float | None]`): Values by name.
        """
        entry = {"step": step} | {name: value if _is_finite(value) else None for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class ProgressBar:
    """
    Steps done, loss terms and time left: a bar in a terminal, one line of bounded length per report in a file.

    Args:
        total (`int`): Steps of the whole run.
        initial (`int`): Steps already done; they count as progress, not for the rate or the time left.
        description (`str`): What is being trained.
        enabled (`bool`, *optional*, defaults to `True`): Give `False` on all processes but one.
    """

    def __init__(self, total: int, initial: int, description: str, enabled: bool = True):
        self.total, self.initial, self.description, self.enabled = total, initial, description, enabled
        self._start = time.monotonic()
        interactive = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=initial, desc=description, disable=not interactive, dynamic_ncols=True)
        self._interactive = interactive

    def advance(self) -> None:
        """Count one step."""
        self._bar.update(1)

    def report(self, step: int, values: Mapping[str, float | None]) -> None:
        """
        Show values.

        Args:
            step (`int`): Steps done.
            values (`Mapping[str, float | None]`): Values by name, the most important first: what does not fit in the
                line is counted, not shown.
        """
        if self._interactive:
            self._bar.set_postfix({name: _short(value) for name, value in values.items()})
        elif self.enabled:
            # All time counts, also that of checkpoints and validation: more of them are to come.
            seconds = (time.monotonic() - self._start) / max(step - self.initial, 1)
            left = tqdm.format_interval(seconds * (self.total - step))
            line = f"{self.description}: {step}/{self.total} [{left} left, {seconds:.3g} s/step]"
            print(_bounded_line(line, values), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class TrainingMonitor:
    """
    Averages loss terms on the device and reports them now and then; the host waits for the device only then, and for
    one transfer.

    Terms are collected with [`~TrainingMonitor.add`] during a step, and [`~TrainingMonitor.advance`] ends the step. It
    may be told, by a tensor on the device, that the step was skipped: the terms of such a step, finite or not, enter
    no average, and the step is counted.

    Args:
        output_dir (`str` or `Path`): Folder of `training_log.jsonl`.
        description (`str`): What is being trained.
        total (`int`): Steps of the whole run.
        initial (`int`): Steps already done.
        reduce (`Callable[[torch.Tensor], torch.Tensor]`): Averages a tensor over all processes.
        enabled (`bool`): Whether this process writes; give `False` on all but one.
        total_batch_size (`int`, *optional*): Images of one step over all processes: reports then have a rate in images
            per second.
    """

    def __init__(
        self,
        output_dir: str | Path,
        description: str,
        total: int,
        initial: int,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        enabled: bool,
        total_batch_size: int | None = None,
    ):
        self._reduce = reduce
        self._log = TrainingLog(Path(output_dir) / "training_log.jsonl", initial) if enabled else None
        self._bar = ProgressBar(total, initial, description, enabled)
        self._total_batch_size = total_batch_size
        self._reported_step, self._reported_time = initial, time.monotonic()
        self._step_sums: dict[str, torch.Tensor] = {}
        self._step_counts: dict[str, int] = {}
        # For each set of terms that occurs: the sum of each over the steps that had them and were taken, and at last
        # the number of those steps.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._num_steps = 0
        self._taken: torch.Tensor | None = None  # known once a step was said to be taken or not

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """
        Add terms of the current step; those of several micro-batches are averaged.

        Args:
            terms (`Mapping[str, torch.Tensor]`): Scalars of one micro-batch or step, by name; they are detached.
        """
        for name, value in terms.items():
            value = value.detach().float()
            self._step_sums[name] = self._step_sums[name] + value if name in self._step_sums else value
            self._step_counts[name] = self._step_counts.get(name, 0) + 1

    def advance(self, taken: torch.Tensor | None = None) -> None:
        """
        End a step.

        Args:
            taken (`torch.Tensor`, *optional*): Bool scalar on the device of the terms: whether the step was taken, the
                same on all processes. By default it was.
        """
        self._bar.advance()
        self._num_steps += 1
        if self._step_sums:
            names = tuple(self._step_sums)
            values = torch.stack([self._step_sums[name] / self._step_counts[name] for name in names])
            values = torch.cat([values, values.new_ones(1)])
            if taken is not None:
                values = torch.where(taken, values, 0.0)  # not a product, which NaN would survive
            self._sums[names] = self._sums[names] + values if names in self._sums else values
        if taken is not None:
            earlier = self._num_steps - 1 if self._taken is None else self._taken
            self._taken = taken.float() + earlier
        elif self._taken is not None:
            self._taken = self._taken + 1
        self._step_sums, self._step_counts = {}, {}

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float | None]:
        """
        Average what was added since the last report over steps and processes, show it and append it to the log.

        Every process must call this at the same step, between two steps.

        Args:
            step (`int`): Steps done.
            values (`Mapping[str, float]`): Further values to log as they are, such as the learning rate.

        Returns:
            `dict[str, float | None]`: The averages by name, `None` where no step counts; `skipped_steps` since the
            last report, if it is known whether steps were taken; then `values`; and at last, not in the log,
            `images_per_second` since the last report, on this machine's clock.

        Raises:
            FloatingPointError: If an average over steps that were taken is not finite. It is raised before a
                checkpoint of such a state is saved.
        """
        terms = self._averages()
        rate = self._images_per_second(step)
        entry = terms | dict(values)
        if self._log is not None:
            self._log.write(step, entry)
        self._bar.report(step, _shown(rate, terms))
        broken = [name for name, value in terms.items() if value is not None and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"{', '.join(broken)} stopped being finite at or before step {step}; earlier checkpoints are "
                "unaffected. Lower the learning rate, or use mixed precision bf16 instead of fp16."
            )
        return entry | rate

    def last_entry(self) -> dict[str, float | None] | None:
        """The newest entry of the log, also one of an earlier run that this one continues; `None` without a log."""
        return None if self._log is None else self._log.last_entry()

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _averages(self) -> dict[str, float | None]:
        groups = sorted(self._sums)
        tensors = [self._sums[names] for names in groups]
        if self._taken is not None:
            tensors.append(self._taken.reshape(1))
        flat = self._reduce(torch.cat(tensors)).tolist() if tensors else []

        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        position = 0
        for names in groups:
            count = flat[position + len(names)]
            for name, value in zip(names, flat[position:], strict=False):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0.0) + count
            position += len(names) + 1
        terms: dict[str, float | None] = {
            name: total / counts[name] if counts[name] else None for name, total in sums.items()
        }
        if self._taken is not None:
            terms["skipped_steps"] = self._num_steps - round(flat[-1])
        self._sums, self._num_steps, self._taken = {}, 0, None
        return terms

    def _images_per_second(self, step: int) -> dict[str, float]:
        steps, now = step - self._reported_step, time.monotonic()
        seconds = max(now - self._reported_time, 1e-9)
        self._reported_step, self._reported_time = step, now
        if self._total_batch_size is None or steps == 0:
            return {}
        return {"images_per_second": steps * self._total_batch_size / seconds}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _shown(rate: Mapping[str, float], terms: Mapping[str, float | None]) -> dict[str, float | None]:
    """Most important first, since a line may have no room for all: rate, loss, skipped steps if there are any."""
    shown: dict[str, float | None] = {name.replace("_per_second", "/s"): value for name, value in rate.items()}
    order = sorted(terms, key=lambda name: {"loss": 0, "skipped_steps": 1}.get(name, 2))
    return shown | {name: terms[name] for name in order if name != "skipped_steps" or terms[name]}


def _bounded_line(start: str, values: Mapping[str, float | None]) -> str:
    """As many values as fit; the last words say how many are in the log file only."""
    shown = [f"{name} {_short(value)}" for name, value in values.items()]
    line = " ".join([start, ", ".join(shown)])
    for count in reversed(range(len(shown))):
        if len(line) <= LINE_LENGTH:
            break
        line = " ".join([start, ", ".join([*shown[:count], f"{len(shown) - count} more in training_log.jsonl"])])
    return line
