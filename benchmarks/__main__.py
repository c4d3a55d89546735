"""Speed of everything: encoding, decoding, training, generating, loading; and two results side by side.

    python -m benchmarks                                  everything: hours on two CPU cores
    python -m benchmarks --groups tokenizer generators    some groups, the others' records stay
    python -m benchmarks --list                           the groups and their cases
    python -m benchmarks --compare a.json b.json          ratios of two results

A share is of the rate of a matrix product of 2048 rows, of the same type and threads, that is measured right before
and after each call; operations are those of matrix products, attention and convolutions that the call executes.
Seconds are medians with quartiles, after a first call (which compiles, with nothing from earlier processes) and a
warm-up; of whole sampling runs, the first call and the peak memory are of one of 4 steps. Weights and inputs are
random, sizes the published ones.
Peak memory is that of the process on a CPU, weights included, and torch's on a GPU. Models have their queries, keys
and values in one product (`fuse_qkv_projections()`), except in training.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .machine import RESULTS, ROOT, machine, write_results
from .suite import data, inference, rivals, sampling, startup, training
from .suite.cases import DEVICES, DTYPES, MODES, USUAL_MODES, Case, all_settings
from .suite.curves import draw
from .suite.report import compare, to_markdown
from .suite.running import available_devices, measure, merge
from .suite.timing import Effort


CASES: list[Case] = [
    *inference.TOKENIZER,
    *inference.GENERATORS,
    *rivals.CASES,
    *training.CASES,
    *sampling.CASES,
    *data.CASES,
    *inference.SCALING,
]
STARTUP, PROCESSES = "startup", "processes"
GROUPS = [*dict.fromkeys(case.group for case in CASES), STARTUP, PROCESSES]
OUTPUT = RESULTS / "suite.json"
PICTURES = ROOT / "docs" / "images"
EFFORTS = {
    "sampling": Effort(min_rounds=3, warmup_seconds=0.0),  # a run of hundreds of passes repeats itself
    rivals.CASES[0].group: Effort(min_rounds=11),
}
NUM_PROCESSES = (1, 2)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="What to measure.")
    parser.add_argument("--match", default="", help="Only cases whose name has this text.")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=None, help="Where; all that are there.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="In which types.")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="How.")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="About how long to repeat a call.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="The result, beside which its tables are written.")
    parser.add_argument(
        "--picture_dir", type=Path, default=None, help="Where the scaling curves are drawn; beside another --output."
    )
    parser.add_argument("--list", action="store_true", help="Name the cases and end.")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="Compare two results and end.")
    args = parser.parse_args(words)
    if args.num_threads < 1 or args.seconds <= 0:
        parser.error(f"--num_threads and --seconds must be positive, got {args.num_threads} and {args.seconds}")
    if args.output.suffix != ".json":
        parser.error(f"--output must name a .json file, got {args.output}")
    if args.picture_dir is None:
        args.picture_dir = PICTURES if args.output == OUTPUT else args.output.parent
    there = available_devices()
    if missing := [device for device in args.devices or [] if device not in there]:
        parser.error(f"--devices {missing[0]} is not on this machine, which has: {', '.join(there)}")
    args.devices = args.devices or there
    return args


def read(path: Path) -> dict[str, Any]:
    """A result of the suite."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a result of the suite: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("records"), list):
        raise ValueError(f"{path} is no result of the suite: it has no records.")
    return report


def begin_report(args: argparse.Namespace) -> dict[str, Any]:
    """An empty report, or the one that is there, if it is of this machine."""
    facts = machine("diffusers", "accelerate")
    if args.output.exists():
        report = read(args.output)
        if report["machine"] != facts or report["num_threads"] != args.num_threads:
            raise ValueError(
                f"{args.output} was measured on another machine, with other versions or threads: give another "
                "--output, or remove it."
            )
        return report
    return {"command": "python -m benchmarks", "machine": facts, "num_threads": args.num_threads, "records": []}


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    method = "\n\n".join(str(__doc__).split("\n\n")[2:])
    write_results(args.output.parent, args.output.stem, report, to_markdown(report, CASES, method))


def run(args: argparse.Namespace) -> bool:
    """Measure what is asked for, writing the results after each; whether all of it worked."""
    report, worked = begin_report(args), True
    for case in CASES:
        if case.group not in args.groups or args.match not in case.name:
            continue
        effort = replace(EFFORTS.get(case.group, Effort()), seconds=args.seconds)
        for settings in case.settings(args.devices, args.dtypes, args.modes):
            begin = time.perf_counter()
            record = measure(case, settings, args.num_threads, effort)
            report["records"] = merge(report["records"], record)
            write(args, report)
            worked &= "failed" not in record
            said = record.get("failed") or {name: record[name] for name in ("seconds", "share_of_matmul")}
            label = f"{case.group}: {case.name}, {settings.device}, {settings.dtype}, {settings.mode}"
            print(f"[{time.perf_counter() - begin:.0f} s] {label}: {said}", flush=True)
    if STARTUP in args.groups and not args.match:
        report["imports"] = startup.import_seconds()
        report["first_images"] = []
        for settings in all_settings(args.devices, args.dtypes, [mode for mode in USUAL_MODES if mode in args.modes]):
            record = {"case": f"SiT-B, {startup.STEPS} steps, one image, default guidance"} | asdict(settings)
            record |= startup.first_image(settings, args.num_threads)
            report["first_images"].append(record)
            write(args, report)
            worked &= "failed" not in record
            print(f"startup: {record}", flush=True)
    if PROCESSES in args.groups and not args.match and "cpu" in args.devices:
        report["processes"] = {str(count): data.encoding_rate(count, args.num_threads) for count in NUM_PROCESSES}
        write(args, report)
    return worked


def main() -> int:
    args = parse()
    try:
        if args.compare:
            print(compare(*map(read, args.compare)))
            return 0
        if args.list:
            for case in CASES:
                print(f"{case.group}: {case.name} ({', '.join(case.devices)})")
            return 0
        worked = run(args)
        for device in args.devices:
            draw(read(args.output), CASES, device, args.picture_dir / f"scaling-{device}.png")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The results are in {args.output} and beside it.")
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())
