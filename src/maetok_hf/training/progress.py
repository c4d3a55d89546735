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

    def last_entry(self) -> dict[str, float] | None:
        """The newest entry, `None` if there is none."""
        lines = self._lines()
        return json.loads(lines[-1]) if lines else None

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        # A line without its end was being written when the process was killed.
        return text[: text.rfind("\n") + 1].splitlines()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """
        Append an entry; values that are not finite are written as `null`, which JSON has instead.
        """
        entry = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class ProgressBar:
    """
    Steps done, loss terms and time left: a bar in a terminal, one line per report in a file.

    Args:
        total (`int`): Steps of the whole run.
        initial (`int`): Steps already done.
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

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """
        Show values.

        Args:
            step (`int`): Steps done.
            values (`Mapping[str, float]`): Values by name.
        """
        if self._interactive:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
        elif self.enabled:
            seconds = (time.monotonic() - self._start) / max(step - self.initial, 1)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            left = tqdm.format_interval(seconds * (self.total - step))
            print(
                f"{self.description}: {step}/{self.total} [{left} left, {seconds:.3g} s/step] {shown}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class TrainingMonitor:
    """
    Averages loss terms on the device and reports them now and then; the host waits for the device only then.

    Args:
        output_dir (`str` or `Path`): Folder of `training_log.jsonl`.
        description (`str`): What is being trained.
        total (`int`): Steps of the whole run.
        initial (`int`): Steps already done.
        reduce (`Callable[[torch.Tensor], torch.Tensor]`): Averages a tensor over all processes.
        enabled (`bool`): Whether this process writes; give `False` on all but one.
    """

    def __init__(
        self,
        output_dir: str | Path,
        description: str,
        total: int,
        initial: int,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        enabled: bool,
    ):
        self._reduce = reduce
        self._log = TrainingLog(Path(output_dir) / "training_log.jsonl", initial) if enabled else None
        self._bar = ProgressBar(total, initial, description, enabled)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            terms (`Mapping[str, torch.Tensor]`): Scalars of one micro-batch or step, by name; they are detached.
        """
        for name, value in terms.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def advance(self) -> None:
        """Count one step."""
        self._bar.advance()

    def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """
        Average what was added since the last report over time and processes, show it and append it to the log.

        Every process must call this at the same step.

        Args:
            step (`int`): Steps done.
            values (`Mapping[str, float]`): Further values to log as they are, such as the learning rate.

        Returns:
            `dict[str, float]`: The averages by name.

        Raises:
            FloatingPointError: If an average is not finite. It is raised before a checkpoint of such a state is saved.
        """
        names = sorted(self._sums)
        averages = self._reduce(torch.stack([self._sums[name] / self._counts[name] for name in names])).tolist()
        self._sums, self._counts = {}, {}
        terms = dict(zip(names, averages, strict=True))
        if self._log is not None:
            self._log.write(step, terms | dict(values))
        self._bar.report(step, terms)
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"{', '.join(broken)} stopped being finite at or before step {step}; earlier checkpoints are "
                "unaffected. Lower the learning rate, or use mixed precision bf16 instead of fp16."
            )
        return terms

    def last_entry(self) -> dict[str, float] | None:
        """The newest entry of the log, also one of an earlier run that this one continues; `None` without a log."""
        return None if self._log is None else self._log.last_entry()

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()
