"""Results of the suite as tables, and two of them side by side."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..machine import machine_line, table
from .cases import DEVICES, Case, key_of


HEAD = (
    "case", "type", "mode", "seconds a call", "images/s", "GFLOP a call", "share of the matrix rate (%)",
    "rounds", "first call (s)", "peak (GB)",
)  # fmt: skip
RIVAL_HEAD = ("case", "type", "mode", "seconds a call", "naive form (s)", "times as fast", "rounds")
FIRST_IMAGE = ("import", "load", "first image", "second image")
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(quartiles: dict[str, float], scale: float = 1.0) -> str:
    """A median with its quartiles."""
    low, middle, high = (number(scale * quartiles[name]) for name in ("quartile_1", "median", "quartile_3"))
    return f"{middle} ({low} to {high})"


def name_cells(record: dict[str, Any]) -> list[str]:
    """What a record is of."""
    earlier = "" if record.get("commit") else " (earlier code)"
    return [record["case"], record["dtype"], record["mode"] + earlier]


def row(record: dict[str, Any]) -> list[str]:
    """Cells of a record."""
    cells = name_cells(record)
    if "failed" in record:
        return [*cells, f"failed: {record['failed']}", *["" for _ in HEAD[4:]]]
    seconds, share = record["seconds"], record["share_of_matmul"]
    return [
        *cells,
        spread(seconds),
        number(record["images"] / seconds["median"]) if record["images"] else "",
        number(record["flops"] / 1e9) if record["flops"] else "",
        spread(share, 100) if share else "",
        str(record["num_rounds"]),
        number(record["first_call_seconds"]),
        number(record["peak_bytes"] / 1e9),
    ]


def rival_row(record: dict[str, Any]) -> list[str]:
    """Cells of a record with a rival."""
    cells = name_cells(record)
    if "failed" in record:
        return [*cells, f"failed: {record['failed']}", "", "", ""]
    values = [spread(record[name]) for name in ("seconds", "rival_seconds", "speedup")]
    return [*cells, *values, str(record["num_rounds"])]


def group_lines(name: str, records: Sequence[dict[str, Any]], cases: Iterable[Case]) -> list[str]:
    """A section: a table for every device; what could not be measured by name."""
    lines = [f"## {name[0].upper()}{name[1:]}", ""]
    cases = [case for case in cases if case.group == name]
    for device in DEVICES:
        mine = [record for record in records if record["group"] == name and record["device"] == device]
        places = {case.name: place for place, case in enumerate(cases)}
        mine.sort(key=lambda record: (places.get(record["case"], len(places)), record["dtype"] != "float32"))
        if mine:
            rivals = any("speedup" in record for record in mine)
            rows = [rival_row(record) if rivals else row(record) for record in mine]
            lines += [f"{DEVICE_NAMES[device]}:", "", *table(RIVAL_HEAD if rivals else HEAD, rows)]
        mine_to_be = [case for case in cases if device in case.devices]
        missing = [words for case in mine_to_be if (words := missing_of(case, device, mine))]
        if missing and not mine:
            lines += [f"{DEVICE_NAMES[device]}: not measured, {len(missing)} cases.", ""]
        elif missing:
            lines += [f"{DEVICE_NAMES[device]}, not measured: {'; '.join(missing)}.", ""]
    return lines


def missing_of(case: Case, device: str, records: Iterable[dict[str, Any]]) -> str:
    """What of a case is not measured on a device: its name, with the settings if others of it are measured."""
    measured = {(record["dtype"], record["mode"]) for record in records if record["case"] == case.name}
    settings = [(one.dtype, one.mode) for one in case.settings([device], case.dtypes, case.modes)]
    missing = [one for one in settings if one not in measured]
    if not missing:
        return ""
    return case.name + (f" ({', '.join(map(' '.join, missing))})" if measured else "")


def startup_lines(report: dict[str, Any]) -> list[str]:
    """The section of what comes before the steady state."""
    lines = ["## Start", ""]
    if not any(report.get(name) for name in ("imports", "first_images", "processes")):
        return [*lines, "Not measured.", ""]
    if imports := report.get("imports"):
        rows = [[name, number(seconds)] for name, seconds in imports.items()]
        lines += ["Seconds of an import in a new process, what it imports itself included:", ""]
        lines += table(["import", "seconds"], rows)
    for record in report.get("first_images", []):
        parts = [f"{name} {number(record[name])} s" for name in FIRST_IMAGE if name in record]
        if "failed" in record:
            parts = [f"failed: {record['failed']}"]
        lines += [f"- {record['case']}, {record['device']}, {record['dtype']}, {record['mode']}: {', '.join(parts)}"]
    if report.get("processes"):
        rows = [[count, number(rate)] for count, rate in report["processes"].items()]
        lines += ["", "Encoding in float32 by processes that share the cores, images/s of all together:", ""]
        lines += table(["processes", "images/s"], rows)
    return [*lines, ""]


def to_markdown(report: dict[str, Any], cases: Sequence[Case], method: str) -> str:
    """The results as tables."""
    groups = list(dict.fromkeys(case.group for case in cases))
    rates = "; ".join(
        f"{record['device']} {record['dtype']} {number(record['low'] / 1e9)} to {number(record['high'] / 1e9)}"
        for record in matmul_rates(report["records"])
    )
    commits = dict.fromkeys(record["commit"] for record in report["records"] if record.get("commit"))
    lines = ["# Speed", "", *method.strip().splitlines(), ""]
    lines += [
        f"- {report['num_threads']} threads; {machine_line(report['machine'])}",
        f"- the matrix product of 2048 rows reached meanwhile, in GFLOP/s: {rates or 'not measured'}",
        f"- commits: {', '.join(commits) or 'not known'}; of earlier code it was not kept",
        "- what is not measured is named under its table; `python -m benchmarks --list` names all cases",
        "",
        "```",
        report["command"],
        "```",
        "",
    ]
    for name in groups:
        lines += group_lines(name, report["records"], cases)
    return "\n".join([*lines, *startup_lines(report)])


def matmul_rates(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lowest and highest rate of the matrix product by device and type."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if "failed" not in record:
            found.setdefault((record["device"], record["dtype"]), []).append(record["matmul_flops_per_second"])
    return [
        {"device": device, "dtype": dtype, "low": min(rates), "high": max(rates)}
        for (device, dtype), rates in sorted(found.items())
    ]


def compare(first: dict[str, Any], second: dict[str, Any]) -> str:
    """
    Two reports side by side.

    Args:
        first, second (`dict`): Reports of the suite.

    Returns:
        `str`: A table of the cases that both have measured, and how many only one has.

    Raises:
        ValueError: If they have no case in common.
    """
    sides = [
        {key_of(record): record for record in report["records"] if "failed" not in record}
        for report in (first, second)
    ]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise ValueError("the two results have no measured case in common: run the same groups on both machines.")
    rows = []
    for key in common:
        one, two = (side[key] for side in sides)
        shares = [
            f"{100 * record['share_of_matmul']['median']:.0f} %" if record["share_of_matmul"] else ""
            for record in (one, two)
        ]
        before, after = (record["seconds"]["median"] for record in (one, two))
        rows.append([key, number(before), number(after), f"{before / after:.2f}", *shares])
    head = ["case", "first (s)", "second (s)", "second is times as fast", "first, share", "second, share"]
    lines = [
        f"first: {machine_line(first['machine'])}",
        f"second: {machine_line(second['machine'])}",
        "",
        *table(head, rows),
        f"Only in the first: {len(sides[0]) - len(common)}. Only in the second: {len(sides[1]) - len(common)}.",
    ]
    return "\n".join(lines)
