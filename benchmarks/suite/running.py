"""Measures cases, each in a process of its own."""

import concurrent.futures
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

from ..machine import commit
from .cases import CUDA_GRAPHS, Case, Settings
from .timing import Effort, seconds_of, time_work


def run_case(case: Case, settings: Settings, num_threads: int, effort: Effort) -> dict[str, Any]:
    """Build a case and time it; run this in a process of its own."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    # what an earlier process compiled would shorten the first call; what a case writes goes with it
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{folder}/compiled"),
        patch.object(tempfile, "tempdir", folder),
    ):
        work = case.build(settings)
        if settings.mode == CUDA_GRAPHS:
            work.run, work.warm = map(mark_step_before, (work.run, work.warm))
        if settings.mode == "eager":
            first = seconds_of(work.warm, settings.torch_device)
            flops = work.flops()
        else:
            assert work.compile is not None, f"{case.name} has no compiled mode"
            flops = work.flops()  # which is not done to compiled code
            work.compile()
            first = seconds_of(work.warm, settings.torch_device)
        timed = time_work(work, flops, settings.torch_device, settings.torch_dtype, effort)
    return {"images": work.images, "flops": flops, "effort": asdict(effort), "first_call_seconds": first} | timed


def mark_step_before(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a step of torch's CUDA graphs, until whose end the encoder's output stays for the decoder."""

    def marked() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return run()

    return marked


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
    found |= {"load_average": round(os.getloadavg()[0], 2), "commit": commit()}
    return identity(case, settings) | found


def available_devices() -> list[str]:
    """Devices of this machine that the suite knows."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def merge(old: Iterable[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Records with one more, in the place of an earlier one of the same case and settings."""
    names = ("group", "case", "device", "dtype", "mode")
    same = [record for record in old if [record[name] for name in names] != [new[name] for name in names]]
    return [*same, new]
