"""What share of the rate of matrix products models reach on a CPU, and what their products and attention alone reach.

In the same rounds are timed the whole model, its skeleton (the same number of blocks of the same sizes with nothing
but their matrix products, GELU and attention, in one graph), and the product of 2048 rows whose rate the suite takes
for 100 %. Models have their queries, keys and values in one product; all is compiled, weights are constants. What a
model does not reach of its skeleton is taken by norms, residuals, modulation, positions and what is around the
blocks; what the skeleton does not reach, by torch's kernels, of which the parts of a block are timed one by one too.

    python -m benchmarks.roofline

writes `roofline.json` and `.md`.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config

from maetok_hf.models.layers import pad_keys

from .machine import RESULTS, closing_lines, commit, machine, table, write_results
from .suite.cases import DTYPES, Settings, Work
from .suite.inference import reconstruct, velocity
from .suite.timing import MATMUL_FLOPS, MATMUL_SIZE, quartiles, seconds_of


COMMAND = "python -m benchmarks.roofline"
CPU = torch.device("cpu")
MODEL, SKELETON, OF_SKELETON = "model", "skeleton", "model, of the skeleton"
PARTS = ("queries, keys, values", "output", "feed-forward, first, with its GELU", "feed-forward, second", "attention")


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
        product = 2 * rows * width**2
        flops = (3 * product, product, 4 * product, 4 * product, 4 * rows * self.tokens * width)
        return dict(zip(PARTS, flops, strict=True))


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


class Skeleton(nn.Module):
    """
    Blocks of nothing but products, GELU and attention.

    Args:
        block ([`Block`]): Their sizes.
        num_layers (`int`): How many.
    """

    def __init__(self, block: Block, num_layers: int):
        super().__init__()
        self.block = block
        sizes = ((1, 3), (1, 1), (1, 4), (4, 1))
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(rows * block.width, columns * block.width) for rows, columns in sizes)
            for _ in range(num_layers)
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)  # without norms, values would become too small to be normal numbers

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of shape `(batch_size, tokens, width)` to the like."""
        for projections, out, first, second in self.layers:
            parts = projections(tokens).chunk(3, dim=-1)
            query, key, value = (part.unflatten(-1, (self.block.heads, -1)) for part in parts)
            tokens = out(attend(query, key, value).transpose(1, 2).flatten(2))
            tokens = second(F.gelu(first(tokens), approximate=self.block.approximate))
        return tokens


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of tensors of shape `(batch_size, tokens, heads, head_dim)` as the models compute it, heads first."""
    key, value, mask = pad_keys(key, value)
    heads_first = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)


def parts_of(block: Block, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls of a block's parts."""
    width, rows = block.width, block.batch_size * block.tokens
    generator = torch.Generator().manual_seed(0)
    tokens, hidden = (torch.randn(rows, n, generator=generator).to(dtype) for n in (width, 4 * width))
    projections = compiled(nn.Linear(width, 3 * width), dtype)
    out = compiled(nn.Linear(width, width), dtype)
    first = compiled(nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(block.approximate)), dtype)
    second = compiled(nn.Linear(4 * width, width), dtype)
    heads = (block.batch_size, block.tokens, block.heads, block.head_dim)
    query, key, value = (torch.randn(heads, generator=generator).to(dtype) for _ in range(3))
    calls = (
        lambda: projections(tokens),
        lambda: out(tokens),
        lambda: first(tokens),
        lambda: second(hidden),
        lambda: attend(query, key, value),
    )
    return dict(zip(PARTS, calls, strict=True))


@torch.no_grad()
def measure(model: Model, dtype: str, num_rounds: int) -> dict[str, Any]:
    """Times of the parts, the skeleton and the model, and their shares, formed within rounds."""
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
        skeletons = []
        for block, num_layers in model.blocks.items():
            shape = (block.batch_size, block.tokens, block.width)
            tokens = torch.randn(shape, generator=generator).to(settings.torch_dtype)
            skeletons.append(functools.partial(compiled(Skeleton(block, num_layers), settings.torch_dtype), tokens))
        work = model.build(settings)
        model_flops = work.flops()
        work.compile()
        for call in (*parts.values(), *skeletons, work.run):
            call()
            call()

    def product() -> float:
        return seconds_of(lambda: factors[0] @ factors[1], CPU)

    flops = {(block, name): number for block in model.blocks for name, number in block.flops().items()}
    skeleton_flops = sum(model.blocks[block] * number for (block, _), number in flops.items())

    def share(operations: int, seconds: float, products: Sequence[float]) -> float:
        return operations / seconds * sum(products) / len(products) / MATMUL_FLOPS

    milliseconds: dict[Any, list[float]] = {}
    shares: dict[Any, list[float]] = {}
    for number in range(num_rounds + 1):
        looks = [product()]
        taken: dict[Any, float] = {place: seconds_of(call, CPU) for place, call in parts.items()}
        looks.append(product())
        taken[SKELETON] = sum(seconds_of(call, CPU) for call in skeletons)
        looks.append(product())
        taken[MODEL] = seconds_of(work.run, CPU)
        looks.append(product())
        if number == 0:  # the first product is slower
            continue
        reached = {place: share(flops[place], taken[place], looks[:2]) for place in parts}
        reached[SKELETON] = share(skeleton_flops, taken[SKELETON], looks[1:3])
        reached[MODEL] = share(model_flops, taken[MODEL], looks[2:])
        reached[OF_SKELETON] = reached[MODEL] / reached[SKELETON]
        reached["rate"] = MATMUL_FLOPS / statistics.mean(looks)
        for place, value in reached.items():
            shares.setdefault(place, []).append(value)
        for place, value in taken.items():
            milliseconds.setdefault(place, []).append(1e3 * value)
    return {
        "parts": [
            {
                "block": block.name,
                "part": name,
                "milliseconds": quartiles(milliseconds[block, name]),
                "share": quartiles(shares[block, name]),
            }
            for block, name in parts
        ],
        "milliseconds": {name: quartiles(milliseconds[name]) for name in (MODEL, SKELETON)},
        "shares": {name: quartiles(shares[name]) for name in (MODEL, SKELETON, OF_SKELETON)},
        "matmul_flops_per_second": quartiles(shares["rate"]),
    }


def percent(found: dict[str, float]) -> str:
    """A share with its quartiles."""
    return f"{100 * found['median']:.0f} ({100 * found['quartile_1']:.0f} to {100 * found['quartile_3']:.0f})"


def to_markdown(report: dict[str, Any]) -> str:
    models = [
        [
            row["model"],
            row["dtype"],
            *(f"{row['milliseconds'][name]['median']:.0f}" for name in (MODEL, SKELETON)),
            *(percent(row["shares"][name]) for name in (MODEL, SKELETON, OF_SKELETON)),
            f"{row['matmul_flops_per_second']['median'] / 1e9:.0f}",
        ]
        for row in report["rows"]
    ]
    blocks = []
    for row in report["rows"]:
        for name in dict.fromkeys(part["block"] for part in row["parts"]):
            cells = [
                f"{part['milliseconds']['median']:.2f} ms, {percent(part['share'])}"
                for part in row["parts"]
                if part["block"] == name
            ]
            blocks.append([name, row["dtype"], *cells])
    head = ["model", "type", "model (ms)", "skeleton (ms)", "model (%)", "skeleton (%)", "model, of the skeleton (%)"]
    lines = [
        "# What models reach on a CPU, and what their products and attention alone reach",
        "",
        *str(__doc__).split("\n\n")[1].splitlines(),
        "",
        *table([*head, "2048 rows, GFLOP/s"], models),
        "The parts of a block, each called by itself:",
        "",
        *table(["block", "type", *PARTS], blocks),
        "Milliseconds and shares in percent of the rate of that product; medians and quartiles of "
        f"{report['num_rounds']} rounds. A share above 100 is of a packed matrix, which the product of 2048 rows does "
        "not have. Operations of a model are its own: tokens that do not leave it are not computed to the end.",
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
        "commit": commit(),
        "num_threads": torch.get_num_threads(),
        "num_rounds": args.num_rounds,
        "rows": rows,
    }
    text = to_markdown(report)
    write_results(args.results_dir, "roofline", report, text)
    print(text)


if __name__ == "__main__":
    main()
