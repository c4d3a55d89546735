"""What the numbers of a benchmark depend on besides the code, and how its results are written."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine(*packages: str) -> dict[str, Any]:
    """
    Processors, devices and versions; no names of machines or places.

    Args:
        *packages (`str`): Installed packages that the numbers depend on, besides torch.
    """
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "processors": os.cpu_count(),
        "architecture": platform.machine(),
        "accelerators": devices,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", *packages)},
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The facts of [`machine`] in a line."""
    devices = f" and {', '.join(facts['accelerators'])}" if facts["accelerators"] else ", no accelerator"
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    return f"{facts['processors']} CPU cores ({facts['architecture']}){devices}; Python {facts['python']}, {packages}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    return [*("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)), ""]


def closing_lines(report: dict[str, Any]) -> list[str]:
    """The end of a page of results: threads, machine and command."""
    return [
        f"- {report['num_threads']} threads; {machine_line(report['machine'])}",
        "",
        "```",
        report["command"],
        "```",
    ]


def write_results(folder: Path, name: str, report: dict[str, Any], text: str) -> None:
    """Write `name.json` and `name.md`, which appear when they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", json.dumps(report, indent=2) + "\n"), ("md", text.rstrip("\n") + "\n")):
        partial = folder / f".{name}.{suffix}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, folder / f"{name}.{suffix}")
