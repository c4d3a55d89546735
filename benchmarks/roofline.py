"""What share of the rate of matrix products models reach on a CPU, and what torch's kernels would allow at most.

A transformer block on a CPU is four products of its width, two of its feed-forward part, and attention. Each is timed
by itself at the sizes of the published models, compiled with its weights as constants, and in the same rounds the
whole model, compiled in the same way, and the product of 2048 rows whose rate the suite takes for 100 %. The bound is
the share of a model of nothing but these parts: norms, residuals, modulation, positions and everything outside the
blocks take no time.

    python -m benchmarks.roofline

writes `roofline.json` and `.md`.
"""

import argparse
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config

from maetok_hf.models.layers import pad_keys

from .machine import RESULTS, closing_lines, machine, table, write_results
from .suite.cases import DTYPES, Settings, Work
from .suite.inference import reconstruct, velocity
from .suite.timing import MATMUL_FLOPS, MATMUL_SIZE, quartiles, seconds_of


COMMAND = "python -m benchmarks.roofline"
CPU = torch.device("cpu")
PARTS = ("queries, keys, values, output", "feed-forward, first, with its GELU", "feed-forward, second", "attention")
MODEL, PARTS_PRODUCT, MODEL_PRODUCT = "model", "product around the parts", "product around the model"


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
        products = 8 * rows * width**2
        return dict(zip(PARTS, (products, products, products, 4 * rows * self.tokens * width), strict=True))


@dataclass(frozen=True)
class Model:
    """A model of the suite, and the blocks that are nearly all of it."""

    name: str
    blocks: dict[Block, int]
    build: Callable[[Settings], Work]


def sit(batch_size: int) -> Model:
    """SiT-L."""
    name = f"SiT-L, batch {batch_size}"
    build = functools.partial(velocity, size="SiT-L", batch_size=batch_size)
    return Model(name, {Block(name, batch_size, 128, 16, "tanh"): 24}, build)


MODELS = (
    Model(
        "encode + decode, ViT-B, batch 4",
        {
            Block("ViT-B encoder at 256 x 256, batch 4", 4, 385, 12, "none"): 12,
            Block("ViT-B decoder at 256 x 256, batch 4", 4, 384, 12, "none"): 12,
        },
        functools.partial(reconstruct, batch_size=4),
    ),
    sit(2),
    sit(8),
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
    calls = (
        lambda: square(tokens),
        lambda: first(tokens),
        lambda: second(hidden),
        lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
    )
    return dict(zip(PARTS, calls, strict=True))


@torch.no_grad()
def measure(model: Model, dtype: str, num_rounds: int) -> dict[str, Any]:
    """Seconds of the parts, of the model and of the product, and shares formed within rounds."""
    settings = Settings("cpu", dtype, "compiled")
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator).to(settings.torch_dtype) for _ in range(2)]
    torch.compiler.reset()
    with inductor_config.patch(freezing=True):
        parts = {
            (block, name): call
            for block in model.blocks
            for name, call in parts_of(block, settings.torch_dtype).items()
        }
        work = model.build(settings)
        model_flops = work.flops()
        work.compile()
        for call in (*parts.values(), work.run):
            call()
            call()

    def product() -> float:
        return seconds_of(lambda: factors[0] @ factors[1], CPU)

    rounds: list[dict[Any, float]] = []
    for _ in range(num_rounds + 1):
        before = product()
        taken = {place: seconds_of(call, CPU) for place, call in parts.items()}
        between = product()
        rounds.append({**taken, MODEL: seconds_of(work.run, CPU)})
        rounds[-1][PARTS_PRODUCT] = (before + between) / 2
        rounds[-1][MODEL_PRODUCT] = (between + product()) / 2
    rounds = rounds[1:]  # the first product is slower

    flops = {(block, name): number for block in model.blocks for name, number in block.flops().items()}

    def share(seconds: dict[Any, float], places: Iterable[tuple[Block, str]]) -> float:
        times = [(model.blocks[block], flops[block, name], seconds[block, name]) for block, name in places]
        rate = sum(n * own for n, own, _ in times) / sum(n * own for n, _, own in times)
        return rate * seconds[PARTS_PRODUCT] / MATMUL_FLOPS

    def model_share(seconds: dict[Any, float]) -> float:
        return model_flops / seconds[MODEL] * seconds[MODEL_PRODUCT] / MATMUL_FLOPS

    bounds, reached = [share(seconds, parts) for seconds in rounds], [model_share(seconds) for seconds in rounds]
    blocks = {}
    for block in model.blocks:
        places = [place for place in parts if place[0] == block]
        blocks[block.name] = {
            "milliseconds": {name: quartiles([1e3 * s[block, name] for s in rounds]) for _, name in places},
            "shares": {name: quartiles([share(s, [(block, name)]) for s in rounds]) for _, name in places},
            "share": quartiles([share(s, places) for s in rounds]),
        }
    return {
        "blocks": blocks,
        "bound": quartiles(bounds),
        "share": quartiles(reached),
        "share_of_bound": quartiles([own / bound for own, bound in zip(reached, bounds, strict=True)]),
        "milliseconds": quartiles([1e3 * seconds[MODEL] for seconds in rounds]),
        "matmul_flops_per_second": quartiles([MATMUL_FLOPS / seconds[PARTS_PRODUCT] for seconds in rounds]),
    }


def percent(found: dict[str, float]) -> str:
    """A share with its quartiles."""
    return f"{100 * found['median']:.0f} ({100 * found['quartile_1']:.0f} to {100 * found['quartile_3']:.0f})"


def to_markdown(report: dict[str, Any]) -> str:
    models = [
        [
            row["model"],
            row["dtype"],
            f"{row['milliseconds']['median']:.0f}",
            percent(row["share"]),
            percent(row["bound"]),
            percent(row["share_of_bound"]),
            f"{row['matmul_flops_per_second']['median'] / 1e9:.0f}",
        ]
        for row in report["rows"]
    ]
    blocks = [
        [
            name,
            row["dtype"],
            *(f"{found['milliseconds'][part]['median']:.2f} ms, {percent(found['shares'][part])}" for part in PARTS),
            percent(found["share"]),
        ]
        for row in report["rows"]
        for name, found in row["blocks"].items()
    ]
    head = ["model", "type", "ms", "reached (%)", "bound (%)", "reached, of the bound (%)", "2048 rows, GFLOP/s"]
    lines = [
        "# What models reach on a CPU, and what their parts would allow",
        "",
        *str(__doc__).split("\n\n")[1].splitlines(),
        "",
        *table(head, models),
        "The parts of a block:",
        "",
        *table(["block", "type", *PARTS, "all of them (%)"], blocks),
        "Milliseconds and shares in percent of the rate of that product; medians and quartiles of "
        f"{report['num_rounds']} rounds. A share above 100 is of a packed matrix, which the product of 2048 rows does "
        "not have. The last block of an encoder or decoder does less than the others, which the bound leaves out.",
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
        {"model": model.name, "dtype": dtype, **measure(model, dtype, args.num_rounds)}
        for model in MODELS
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
