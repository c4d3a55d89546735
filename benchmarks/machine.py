"""What the numbers of a benchmark depend on besides the code, and how its results are written."""

import json
import os
import platform
import subprocess
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
        "processor": processor(),
        "accelerators": devices,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", *packages)},
    }


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself and which instructions torch uses of it, as in `"Intel(R) Xeon(R), AVX512"`."""
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [*names[:1], torch.backends.cpu.get_cpu_capability()]
    if "amx_bf16" in next((line for line in lines if line.startswith("flags")), "").split():
        parts.append("AMX")
    return ", ".join(parts)


def commit() -> str | None:
    """The commit of the code, with a mark if it has changed since; `None` where there is no git."""

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        found = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return None
    if found.returncode:
        return None
    changed = git("diff", "--quiet", "HEAD", "--", "src", "benchmarks", ":!benchmarks/results").returncode
    return found.stdout.strip() + ("-changed" if changed else "")


def machine_line(facts: dict[str, Any]) -> str:
    """The facts of [`machine`] in a line."""
    devices = f" and {', '.join(facts['accelerators'])}" if facts["accelerators"] else ", no accelerator"
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    kind = facts.get("processor", facts["architecture"])  # older results do not have it
    return f"{facts['processors']} CPU cores ({kind}){devices}; Python {facts['python']}, {packages}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    return [*("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)), ""]


def closing_lines(report: dict[str, Any]) -> list[str]:
    """The end of a page of results: threads, machine and command."""
    return [
        f"- {report['num_threads']} threads; {machine_line(report['machine'])}",
        *([f"- commit {report['commit']}"] if report.get("commit") else []),
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
