"""How long work takes, and what share of the rate of the device's matrix products it reaches.

Processors shared with others change their speed from minute to minute, by twice or more. So every call is timed
between two looks at the rate of a matrix product of the same type and threads, and the share is formed from these
three and then averaged, not from averages.
"""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import Work


MATMUL_SIZE = 2048
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
_MATMUL_SECONDS = 0.05  # a look at the rate takes about this long
_PEAK_FILE = Path("/proc/self/clear_refs")  # 5 written to it sets the peak to the present size
_STATUS_FILE = Path("/proc/self/status")


@dataclass(frozen=True)
class Effort:
    """
    How much to measure.

    Args:
        min_rounds, max_rounds (`int`): Least and most timed calls.
        seconds (`float`): Time after which no call is begun that is not one of the least.
        warmup_seconds (`float`): Calls are repeated for so long, at least once after the first, before the clocks run.
    """

    min_rounds: int = 5
    max_rounds: int = 30
    seconds: float = 10.0
    warmup_seconds: float = 1.0


def synchronize(device: torch.device) -> None:
    """Wait for the work of an accelerator."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


class MatmulRate:
    """
    Looks at the rate of products of square matrices of 2048 rows.

    Args:
        device (`torch.device`): Where they are computed.
        dtype (`torch.dtype`): Their type.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device = device
        generator = torch.Generator().manual_seed(0)
        shape = (MATMUL_SIZE, MATMUL_SIZE)
        self.factors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
        self.count = 1
        seconds = min(self.look() for _ in range(5))  # the first calls are slower
        self.count = max(1, round(_MATMUL_SECONDS / seconds))

    def look(self) -> float:
        """Seconds of one product now."""
        left, right = self.factors

        def products() -> None:
            for _ in range(self.count):
                left @ right

        return seconds_of(products, self.device) / self.count


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in plain types."""
    if len(values) == 1:
        return dict.fromkeys(("median", "quartile_1", "quartile_3"), values[0])
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartile_1": first, "quartile_3": third}


class PeakMemory:
    """The most memory in use between its making and `read`: of the process on a CPU, else torch's on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type != "cpu":
            torch.get_device_module(device).reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # where it cannot be reset, the peak is the process's since its start
                _PEAK_FILE.write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self.device.type != "cpu":
            return torch.get_device_module(self.device).max_memory_allocated(self.device)
        if _STATUS_FILE.exists():
            for line in _STATUS_FILE.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_work(
    work: Work, flops: int | None, device: torch.device, dtype: torch.dtype, effort: Effort
) -> dict[str, Any]:
    """
    Time calls of some work, and of its rival in turn with them, now one first, now the other.

    Args:
        work ([`~benchmarks.suite.cases.Work`]): The work, after its first call.
        flops (`int`, *optional*): Operations of a call; without it no share is formed.
        device (`torch.device`): Where it computes.
        dtype (`torch.dtype`): Type of the matrix product to compare with.
        effort ([`Effort`]): How much to measure.

    Returns:
        `dict`: In plain types: quartiles of the seconds of the calls, how many they were, the matrix product's
        operations per second, quartiles of the share of that (`None` without `flops`), and the peak memory in bytes;
        with a rival also its seconds, and how many times they are ours.
    """

    def warm_up(call: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        while True:
            seconds_of(call, device)
            if time.perf_counter() - begin >= effort.warmup_seconds:
                break

    warm_up(work.warm)
    memory = PeakMemory(device)
    seconds_of(work.warm, device)
    peak = memory.read()
    if work.rival is not None:
        warm_up(work.rival)

    rate = MatmulRate(device, dtype)
    seconds, rival_seconds, looks = [], [], [rate.look()]
    begin = time.perf_counter()
    while len(seconds) < effort.max_rounds:
        if len(seconds) >= effort.min_rounds and time.perf_counter() - begin > effort.seconds:
            break
        calls = [(work.run, seconds)] if work.rival is None else [(work.run, seconds), (work.rival, rival_seconds)]
        for call, taken in calls if len(seconds) % 2 == 0 else reversed(calls):
            taken.append(seconds_of(call, device))
            looks.append(rate.look())  # after each, so that each comes after the same
    shares = None
    if flops is not None and work.rival is None:
        around = [(before + after) / 2 for before, after in zip(looks[:-1], looks[1:], strict=True)]
        shares = [flops / own * product / MATMUL_FLOPS for own, product in zip(seconds, around, strict=True)]
    found = {
        "seconds": quartiles(seconds),
        "num_rounds": len(seconds),
        "matmul_flops_per_second": MATMUL_FLOPS / statistics.median(looks),
        "share_of_matmul": None if shares is None else quartiles(shares),
        "peak_bytes": peak,
    }
    if rival_seconds:
        ratios = [theirs / own for own, theirs in zip(seconds, rival_seconds, strict=True)]
        found |= {"rival_seconds": quartiles(rival_seconds), "speedup": quartiles(ratios)}
    return found
