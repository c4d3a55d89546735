"""What comes before the steady state: the import, and the first image."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from ..machine import ROOT
from .cases import Settings
from .models import pipeline


REPEATS = 5
STEPS = 10
# in a new process each: from its first line to the end of the call
_IMPORT = "import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
_FIRST_IMAGE = """
import json, sys, time
begin = time.perf_counter()
import torch
from benchmarks.suite.cases import Settings
from maetok_hf import MAETokDiffusionPipeline
found = {"import": time.perf_counter() - begin}
settings = Settings(*sys.argv[2:5])
torch.set_num_threads(int(sys.argv[6]))
pipe = MAETokDiffusionPipeline.from_pretrained(sys.argv[1], dtype=settings.torch_dtype).to(settings.device)
pipe.set_progress_bar_config(disable=True)
found["load"] = time.perf_counter() - begin - found["import"]
for model in (pipe.transformer, pipe.vae):
    model.fuse_qkv_projections()
if settings.mode != "eager":
    settings.compile(pipe.transformer, pipe.vae.decoder)
for name in ("first image", "second image"):
    start = time.perf_counter()
    pipe(7, num_inference_steps=int(sys.argv[5]), output_type="pt")
    if settings.device != "cpu":
        torch.cuda.synchronize()
    found[name] = time.perf_counter() - start
print(json.dumps(found))
"""


def import_seconds() -> dict[str, float]:
    """Median seconds of imports, each in new processes, with files that were read before."""
    found = {}
    for module in ("torch", "diffusers", "maetok_hf"):
        words = [sys.executable, "-c", _IMPORT.format(module=module)]
        runs = [
            float(subprocess.run(words, check=True, capture_output=True, text=True).stdout) for _ in range(REPEATS + 1)
        ]
        found[module] = statistics.median(runs[1:])
    return found


def first_image(settings: Settings, num_threads: int, size: str = "SiT-B", steps: int = STEPS) -> dict[str, Any]:
    """
    Seconds from the start of a process to its first image, and of the second, which is the steady state.

    Args:
        settings ([`Settings`]): Device, type and mode.
        num_threads (`int`): CPU threads.
        size (`str`, *optional*, defaults to `"SiT-B"`): The generator.
        steps (`int`, *optional*, defaults to 10): Steps of a run, with the default guidance.

    Returns:
        `dict`: Seconds of `import`, `load`, `first image` (compilation is in it) and `second image`; or `failed` with
        the last line of what the process said.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        pipe = pipeline(size, "SDE")
        pipe.to(dtype=torch.float32).save_pretrained(folder)
        del pipe
        words = [
            sys.executable,
            "-c",
            _FIRST_IMAGE,
            folder,
            settings.device,
            settings.dtype,
            settings.mode,
            str(steps),
            str(num_threads),
        ]
        begin = time.perf_counter()
        # nothing that an earlier process compiled
        ran = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        )
        whole = time.perf_counter() - begin
    if ran.returncode:
        return {"failed": (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1][:300]}
    return json.loads(ran.stdout.splitlines()[-1]) | {"process": whole}
