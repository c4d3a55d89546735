"""What the script that trains generators itself costs on cached latents: the share of a step that is not the network.

The script's own `GeneratorTraining` runs on the CPU, where every call returns when its work is done, with clocks put
around its calls from outside. A step lasts from the end of one to the end of the next. Of it,

- forward is the call of the objective, backward is `Tensor.backward`, optimiser is `step` and `zero_grad`,

and everything else is the script's own, by the parts of `training_overhead`: waiting for the loader, which reads and
normalises the latents, making a batch and its keyed draws, clipping, the decision about the step, the moving average,
averaging and reporting terms to log, progress line and TensorBoard (here in *every* step, not every fiftieth), seeds,
schedules and signals. Checkpoints and pictures are not part of a step. The latents are random numbers of the published
shapes, in the files that `cache_latents.py` writes.

    python -m benchmarks.generator_overhead

writes `generator_overhead.json` and `.md`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.data import LatentLayout, ShardWriter, describe_shards, read_shard
from maetok_hf.data.latent_shards import FORMAT_VERSION, METADATA_FILE
from maetok_hf.data.loader import WorkerLoader
from maetok_hf.seeding import keyed_generator
from maetok_hf.training.checkpointing import write_json
from maetok_hf.training.latent_encoding import encoder_digest, load_tokenizer
from maetok_hf.training.latent_statistics import LatentStatistics, summarize_statistics
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.run_options import SiTRunOptions
from maetok_hf.training.sit_recipe import SiTRecipe

from .machine import RESULTS, write_results
from .training_overhead import (
    Case,
    Clock,
    load_script,
    measured,
    measured_report,
    method_lines,
    prepare_process,
    put_clocks,
    run_steps,
    share_lines,
)
from .training_step import RECIPES


COMMAND = "python -m benchmarks.generator_overhead"
NUM_ROWS = 4500  # those of the demonstration; more than a block, of which one is in memory
SETTINGS = "random latents"
# By recipe: tokens, channels, classes
LATENTS = {"demo-sit": (8, 16, 10), "sit-b-256": (128, 32, 1000)}

CASES = (
    Case("demonstration, batch 64", "demo-sit", {}, {"mixed_precision": "no"}, 50, 200),
    Case(
        "demonstration, batch 64, 1 data worker",
        "demo-sit",
        {},
        {"mixed_precision": "no", "dataloader_num_workers": 1},
        50,
        200,
    ),
    Case("SiT-B, 128 x 32, batch 16", "sit-b-256", {"total_batch_size": 16}, {"mixed_precision": "bf16"}, 2, 10),
)


def make_cache(folder: Path, recipe: SiTRecipe, shape: tuple[int, int], num_classes: int, num_rows: int) -> None:
    """
    Write a tiny tokenizer with random weights, and random latents that say they are its own.

    Args:
        folder (`Path`): Where `tokenizer` and `latents` are written.
        recipe ([`SiTRecipe`]): The recipe that will be trained on them: its resolution and flips.
        shape (`tuple[int, int]`): Tokens and channels.
        num_classes, num_rows (`int`): Classes and rows; labels go round.
    """
    torch.manual_seed(0)
    AutoencoderMAE(
        sample_size=recipe.resolution,
        patch_size=16,
        num_latent_tokens=shape[0],
        latent_channels=shape[1],
        hidden_size=32,
        num_layers=1,
        num_attention_heads=1,
        latents_mean=0.0,
        latents_std=1.0,
    ).save_pretrained(folder / "tokenizer")
    layout = LatentLayout(
        num_rows,
        *shape,
        num_views=2 if recipe.random_flip else 1,
        dtype="float16",
        class_names=tuple(f"class {number}" for number in range(num_classes)),
    )
    cache = folder / "latents"
    for shard in range(layout.num_shards):
        write_shard(cache, layout, shard)
    shards = [read_shard(cache, layout, shard, SETTINGS) for shard in range(layout.num_shards)]
    metadata = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "class": AutoencoderMAE.__name__,
            "name_or_path": None,
            "digest": encoder_digest(load_tokenizer(str(folder / "tokenizer"))),
        },
        "resolution": recipe.resolution,
        "statistics": summarize_statistics(shard["statistics"] for shard in shards),
    }
    write_json(cache / METADATA_FILE, metadata | describe_shards(layout, shards))


def write_shard(cache: Path, layout: LatentLayout, shard: int) -> None:
    """Write a shard of standard normal latents, a row group after the other."""
    statistics, rows = LatentStatistics(layout.num_channels), layout.rows(shard)
    generator = keyed_generator(0, "latents of a benchmark", shard)
    with ShardWriter(cache, layout, shard, SETTINGS) as writer:
        for part in torch.tensor(rows).split(layout.rows_per_group):
            size = (layout.num_views, len(part), layout.num_tokens, layout.num_channels)
            latents = torch.randn(size, generator=generator).half()
            statistics.update(latents)
            writer.add(latents.numpy(), (part % len(layout.class_names)).numpy(), part.numpy())
        writer.finish(left_out=[], num_unlabeled=0, statistics=statistics.state().tolist())


def prepare_data(folder: Path) -> dict[str, str]:
    """Tokenizers and latents of all cases, by recipe."""
    for name, (num_tokens, num_channels, num_classes) in LATENTS.items():
        recipe = load_recipe(SiTRecipe, RECIPES / f"{name}.yaml")
        make_cache(folder / name, recipe, (num_tokens, num_channels), num_classes, NUM_ROWS)
    return {name: str(folder / name) for name in LATENTS}


def run_case(case: Case, data: str, num_threads: int) -> dict[str, Any]:
    """Steps of a case in seconds, by part; run it in a process of its own."""
    prepare_process(case, num_threads)
    recipe = load_recipe(SiTRecipe, RECIPES / f"{case.recipe}.yaml", case.overrides)
    script, clock = load_script("train_sit"), Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = SiTRunOptions(
            output_dir=folder,
            tokenizer_name_or_path=f"{data}/tokenizer",
            latents_name_or_path=f"{data}/latents",
            logging_steps=1,
            **case.options,
        )
        training = script.GeneratorTraining(recipe, options)
        run_steps(training, clock, WorkerLoader, lambda: put_clocks(script, training, clock, case.warmup + case.steps))
    return measured(training, clock, case)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    title = "# What the script that trains generators itself costs on cached latents"
    return "\n".join([title, "", *share_lines(report), *method_lines(report, str(__doc__))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--num_rounds", type=int, default=2, help="Processes for each training.")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads.")
    args = parser.parse_args()
    report = measured_report(COMMAND, CASES, run_case, prepare_data, args.num_rounds, args.num_threads)
    write_results(args.results_dir, "generator_overhead", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
