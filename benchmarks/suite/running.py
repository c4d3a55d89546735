"""Measures cases, each in a process of its own."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .cases import Case, Settings
from .timing import Effort, time_work


def run_case(case: Case, settings: Settings, num_threads: int, effort: Effort) -> dict[str, Any]:
    """Build a case and time it; run this in a process of its own."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    work = case.build(settings)
    flops = None
    if work.counted:
        # products of matrices, attention and convolutions, a multiply-add being two operations
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work.run()
        flops = counter.get_total_flops()
    if settings.mode != "eager":
        assert work.compile is not None, f"{case.name} has no compiled mode"
        work.compile()
    timed = time_work(work, flops, settings.torch_device, settings.torch_dtype, effort)
    return {"images": work.images, "flops": flops} | timed


def identity(case: Case, settings: Settings | None = None) -> dict[str, str]:
    """The part of a record that says what it is of."""
    parts = {"group": case.group, "case": case.name}
    if settings is not None:
        parts |= {"device": settings.device, "dtype": settings.dtype, "mode": settings.mode}
    return parts


def measure(case: Case, settings: Settings, num_threads: int, effort: Effort) -> dict[str, Any]:
    """A record of a case: what was measured, or `failed` with the reason."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(run_case, case, settings, num_threads, effort).result()
    except Exception as error:  # a case that runs out of memory or cannot be compiled is a result of the suite
        lines = str(error).splitlines() or [""]
        found = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
    found["load_average"] = round(os.getloadavg()[0], 2)
    return identity(case, settings) | found


def available_devices() -> list[str]:
    """Devices of this machine that the suite knows."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def merge(old: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Records with one more, in the place of an earlier one of the same case and settings."""
    names = ("group", "case", "device", "dtype", "mode")
    same = [record for record in old if [record[name] for name in names] != [new[name] for name in names]]
    return [*same, new]
