"""Records of cells: JSON files that say what was run, where, for how long, and what was measured."""

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..training.checkpointing import write_json


LIBRARIES = ("maetok_hf", "torch", "diffusers", "accelerate", "datasets", "numpy")


def machine(num_threads: int) -> dict[str, Any]:
    """
    Processors, devices and versions; no names of machines or places.

    Args:
        num_threads (`int`): CPU threads of trainings and measures.

    Returns:
        `dict[str, Any]`: Plain types.
    """
    return {
        "processors": os.cpu_count(),
        "threads": num_threads,
        "architecture": platform.machine(),
        "accelerators": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in LIBRARIES},
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The facts of [`machine`] in a line."""
    devices = f" and {', '.join(facts['accelerators'])}" if facts["accelerators"] else ", no accelerator"
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    return (
        f"{facts['processors']} CPU cores ({facts['architecture']}), {facts['threads']} threads{devices}; "
        f"Python {facts['python']}, {packages}"
    )


def read_record(path: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """
    The record of a cell, if there is one.

    Args:
        path (`Path`): The file.
        identity (`Mapping[str, Any]`, *optional*): What the cell must be; a record of another one does not count.

    Returns:
        `dict[str, Any]`, *optional*: The record.
    """
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if identity is not None and record["identity"] != json.loads(json.dumps(identity)):
        return None
    return record


def kept(path: Path, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    A part of a cell's measures, computed unless that was done.

    Args:
        path (`Path`): Its file, in which it is found when a killed study is started again.
        key (`Any`): What it depends on, in plain types; a file of another key is replaced.
        compute (`Callable[[], dict[str, Any]]`): Computes it, in plain types.

    Returns:
        `dict[str, Any]`: The part.
    """
    key = json.loads(json.dumps(key))
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            return content["measured"]
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = json.loads(json.dumps(compute()))
    write_json(path, {"key": key, "measured": measured})
    return measured
