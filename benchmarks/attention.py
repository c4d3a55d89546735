"""Attention in bfloat16 on a CPU: by how much keys that are padded to a multiple of 32 shorten it.

Torch's attention on CPUs takes some lengths of the sequence much longer than the next multiple of 32, on processors
with matrix units for bfloat16 above all. `maetok_hf.models.layers.pad_keys` lengthens keys and values of the lengths
for which that was found; here both forms are timed call by call in turn, for such lengths and for others, at the
published tokenizer's heads. The padding itself, a copy of keys and values, is in the padded form's time. Ratios
change with what else the processor does.

    python -m benchmarks.attention

writes `attention.json` and `.md`.
"""

import argparse
import functools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from maetok_hf.models import layers

from .machine import RESULTS, closing_lines, commit, machine, table, write_results
from .suite.timing import quartiles, seconds_of


COMMAND = "python -m benchmarks.attention"
BATCH_SIZES, HEADS, HEAD_DIM = (1, 4), 12, 64
LENGTHS = {
    130: "U-SiT",
    193: "",
    208: "",
    225: "",
    255: "",
    257: "image and class tokens at 256 x 256",
    289: "",
    321: "",
    353: "",
    385: "the published encoder at 256 x 256",
    386: "",
    400: "",
    401: "",
    415: "",
    417: "",
    449: "",
    453: "",
    465: "",
    481: "",
    511: "",
    513: "",
    1025: "image and class tokens at 512 x 512",
    1153: "the published encoder at 512 x 512",
}
CPU = torch.device("cpu")


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pads: bool) -> torch.Tensor:
    """Attention of tensors of shape `(batch_size, length, heads, head_dim)`, with keys that may be padded, or not."""
    mask = None
    if pads:
        key, value, mask = layers.pad_keys(key, value)
    heads_first = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)


def compare_lengths(lengths: dict[int, str], num_rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """Milliseconds of both forms and their ratios, by length."""
    found = []
    for length, name in lengths.items():
        generator = torch.Generator().manual_seed(length)
        shape = (batch_size, length, HEADS, HEAD_DIM)
        inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3)]
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(-2, num_rounds):
            for pads in times if number % 2 else reversed(times):
                with patch.object(layers, "padded_length", lambda length: length + -length % 32):
                    call = functools.partial(attention, *inputs, pads)
                    seconds = seconds_of(call, CPU)
                if number >= 0:  # the first rounds warm up
                    times[pads].append(1000 * seconds)
        ratios = [plain / padded for plain, padded in zip(times[False], times[True], strict=True)]
        found.append(
            {
                "batch_size": batch_size,
                "length": length,
                "name": name,
                "padded_by_library": layers.padded_length(length) > length,
                "milliseconds": quartiles(times[False]),
                "padded_milliseconds": quartiles(times[True]),
                "times_as_fast": quartiles(ratios),
            }
        )
    return found


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""

    def spread(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} ({values['quartile_1']:.2f} to {values['quartile_3']:.2f})"

    rows = [
        [
            str(entry["batch_size"]),
            str(entry["length"]),
            entry["name"],
            spread(entry["milliseconds"]),
            spread(entry["padded_milliseconds"]),
            spread(entry["times_as_fast"]),
            "yes" if entry["padded_by_library"] else "no",
        ]
        for entry in report["lengths"]
    ]
    description = str(__doc__).split("\n\n")[1]
    head = ["batch", "tokens", "of", "plain (ms)", "padded (ms)", "padded is times as fast", "padded by the library"]
    return "\n".join(
        [
            "# Attention in bfloat16 on a CPU",
            "",
            description,
            "",
            *table(head, rows),
            f"{HEADS} heads of {HEAD_DIM}; medians and quartiles of {report['num_rounds']} rounds.",
            "",
            *closing_lines(report),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the table is written.")
    parser.add_argument("--num_rounds", type=int, default=50, help="Timed calls of each form and length.")
    args = parser.parse_args()
    report = {
        "command": f"{COMMAND} --num_rounds {args.num_rounds}",
        "num_rounds": args.num_rounds,
        "num_threads": torch.get_num_threads(),
        "machine": machine(),
        "commit": commit(),
        "lengths": [
            entry for size in BATCH_SIZES for entry in compare_lengths(LENGTHS, args.num_rounds, batch_size=size)
        ],
    }
    write_results(args.results_dir, "attention", report, to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
