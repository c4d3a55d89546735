"""What share of the rate of matrix products a block could reach with torch's kernels, if nothing else took time.

A transformer block on a CPU is four products of its width, two of its feed-forward part, and attention. Each is timed
by itself at the sizes of the published models, compiled with its weights as constants, and call by call in turn with
the product of 2048 rows whose rate the suite takes for 100 %. The share is that of a block whose norms, residuals,
modulation and positions take no time. `python -m benchmarks` measures whole models, in other minutes.

    python -m benchmarks.roofline

writes `roofline.json` and `.md`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config

from maetok_hf.models.layers import pad_keys

from .machine import RESULTS, closing_lines, machine, table, write_results
from .suite.timing import MATMUL_FLOPS, MATMUL_SIZE, quartiles, seconds_of


COMMAND = "python -m benchmarks.roofline"
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Block:
    """Sizes of a block and of what passes through it."""

    name: str
    batch_size: int
    tokens: int
    heads: int
    approximate: str  # of its GELU
    head_dim: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def flops(self) -> dict[str, int]:
        """Operations of the parts, a multiply-add being two."""
        rows, width = self.batch_size * self.tokens, self.width
        return {
            "queries, keys, values, output": 8 * rows * width**2,
            "feed-forward, first, with its GELU": 8 * rows * width**2,
            "feed-forward, second": 8 * rows * width**2,
            "attention": 4 * rows * self.tokens * width,
        }


BLOCKS = (
    Block("ViT-B encoder at 256 x 256, batch 4", 4, 385, 12, "none"),
    Block("ViT-B decoder at 256 x 256, batch 4", 4, 384, 12, "none"),
    Block("SiT-L, batch 2", 2, 128, 16, "tanh"),
    Block("SiT-L, batch 8", 8, 128, 16, "tanh"),
)


def compiled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module with constant weights, compiled at its first call."""
    module = module.to(dtype).eval().requires_grad_(False)
    module.compile(fullgraph=True)
    return module


def parts_of(block: Block, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls of a block's parts; four products of its width are one call, as they are one graph in a compiled model."""
    width, rows = block.width, block.batch_size * block.tokens
    generator = torch.Generator().manual_seed(0)
    tokens, hidden = (torch.randn(rows, n, generator=generator).to(dtype) for n in (width, 4 * width))
    square = compiled(nn.Sequential(*(nn.Linear(width, width) for _ in range(4))), dtype)
    first = compiled(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(block.approximate)), dtype)
    second = compiled(nn.Linear(4 * width, width), dtype)
    heads = (block.batch_size, block.tokens, block.heads, block.head_dim)
    query, key, value = (torch.randn(heads, generator=generator).to(dtype) for _ in range(3))
    key, value, mask = pad_keys(key, value)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    names = block.flops()
    calls = (
        lambda: square(tokens),
        lambda: first(tokens),
        lambda: second(hidden),
        lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
    )
    return dict(zip(names, calls, strict=True))


@torch.no_grad()
def measure(block: Block, dtype: torch.dtype, num_rounds: int) -> dict[str, Any]:
    """Seconds of the parts and of the product, and shares formed within rounds."""
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator).to(dtype) for _ in range(2)]
    torch.compiler.reset()
    with inductor_config.patch(freezing=True):
        parts, flops = parts_of(block, dtype), block.flops()
        for call in parts.values():
            call()
            call()
    rounds: list[dict[str, float]] = []
    for _ in range(num_rounds + 1):
        product = seconds_of(lambda: factors[0] @ factors[1], CPU)
        rounds.append({name: seconds_of(call, CPU) for name, call in parts.items()})
        rounds[-1]["product"] = (product + seconds_of(lambda: factors[0] @ factors[1], CPU)) / 2
    rounds = rounds[1:]  # the first product is slower

    def share(seconds: dict[str, float], names: list[str]) -> float:
        rate = MATMUL_FLOPS / seconds["product"]
        return sum(flops[name] for name in names) / sum(seconds[name] for name in names) / rate

    return {
        "milliseconds": {name: quartiles([1e3 * seconds[name] for seconds in rounds]) for name in parts},
        "shares": {name: quartiles([share(seconds, [name]) for seconds in rounds]) for name in parts},
        "share": quartiles([share(seconds, list(parts)) for seconds in rounds]),
        "matmul_flops_per_second": quartiles([MATMUL_FLOPS / seconds["product"] for seconds in rounds]),
    }


def percent(found: dict[str, float]) -> str:
    """A share with its quartiles."""
    return f"{100 * found['median']:.0f} ({100 * found['quartile_1']:.0f} to {100 * found['quartile_3']:.0f})"


def to_markdown(report: dict[str, Any]) -> str:
    names = list(BLOCKS[0].flops())
    rows = [
        [
            row["block"],
            row["dtype"],
            *(f"{row['milliseconds'][name]['median']:.2f} ms, {percent(row['shares'][name])}" for name in names),
            percent(row["share"]),
            f"{row['matmul_flops_per_second']['median'] / 1e9:.0f}",
        ]
        for row in report["rows"]
    ]
    lines = [
        "# What a block could reach on a CPU",
        "",
        *str(__doc__).split("\n\n")[1].splitlines(),
        "",
        *table(["block", "type", *names, "all of them (%)", "2048 rows, GFLOP/s"], rows),
        "Milliseconds and shares in percent of the rate of that product; medians and quartiles of "
        f"{report['num_rounds']} rounds. A share above 100 is of a packed matrix, which the product of 2048 rows does "
        "not have.",
        "",
        *closing_lines(report),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rounds", type=int, default=40, help="Timed calls of each part.")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the result is written.")
    args = parser.parse_args()
    if args.num_rounds < 1:
        parser.error(f"--num_rounds must be at least 1, got {args.num_rounds}")
    rows = [
        {"block": block.name, "dtype": dtype, **measure(block, getattr(torch, dtype), args.num_rounds)}
        for block in BLOCKS
        for dtype in DTYPES
    ]
    report = {
        "command": COMMAND + (f" --num_rounds {args.num_rounds}" if args.num_rounds != 40 else ""),
        "machine": machine(),
        "num_threads": torch.get_num_threads(),
        "num_rounds": args.num_rounds,
        "rows": rows,
    }
    text = to_markdown(report)
    write_results(args.results_dir, "roofline", report, text)
    print(text)


if __name__ == "__main__":
    main()
