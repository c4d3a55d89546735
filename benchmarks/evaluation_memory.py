"""Memory and time of scoring 50 000 images of 256 x 256, by the command that scores any set.

Synthetic images are written to an uncompressed `.npz` file of 9.8 GB, and 10 000 others to a reference, as in ADM's
suite. `maetok-eval generation` computes every metric of them with a light extractor, whose features have the sizes of
Inception's: a projection of the image shrunk to 8 x 8. So all that is kept has its real size, and the time is that of
reading, accumulating and of the distances. The time of Inception itself is measured on a few images and stated per
image.

    python -m benchmarks.evaluation_memory

writes `evaluation_memory.json` and `.md`. Takes about 12 GB in `--output_dir`, which is removed in the end.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from maetok_hf.evaluation import InceptionExtractor, weights_digest
from maetok_hf.sampling import write_npz

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results


COMMAND = "python -m benchmarks.evaluation_memory"
SIZE = 256
SHRUNK = 8
# of Inception's pooled and spatial features and its logits
SIZES = {"pool": 2048, "spatial": 2023, "logits": 1008}
METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid_subsets")
LIMIT_GB = 4.0
INCEPTION_IMAGES, INCEPTION_REPEATS = 8, 5


class LightExtractor:
    """Random projections of shrunk images, rectified as Inception's features are, of the sizes of `SIZES`."""

    name, resize = "light, for benchmarks", f"average pooling to {SHRUNK} x {SHRUNK}"

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        inputs = 3 * SHRUNK**2
        self.weights = {
            name: torch.randn(inputs, size, generator=generator) / inputs**0.5 for name, size in SIZES.items()
        }
        module = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in self.weights.items()})
        self.digest = weights_digest(module)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = F.adaptive_avg_pool2d(images.float() / 127.5 - 1, SHRUNK).flatten(1)
        features = {name: rows @ weight for name, weight in self.weights.items()}
        return {name: value if name == "logits" else value.relu() for name, value in features.items()}


def synthetic_images(num_images: int, seed: int) -> Iterator[np.ndarray]:
    """Smooth colours and noise, of shape `(SIZE, SIZE, 3)`; cheap, and no two the same."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 64, (SIZE, SIZE, 3), dtype=np.uint8)
    for _ in range(num_images):
        coarse = generator.integers(0, 192, (SHRUNK, SHRUNK, 3), dtype=np.uint8)
        yield coarse.repeat(SIZE // SHRUNK, axis=0).repeat(SIZE // SHRUNK, axis=1) + noise


def write_set(path: Path, num_images: int, seed: int) -> None:
    """A set in the format of ADM's suite, unless it is there."""
    if not path.is_file():
        labels = np.zeros(num_images, dtype=np.int64)
        write_npz(path, synthetic_images(num_images, seed), (num_images, SIZE, SIZE, 3), labels)


def score(samples: Path, reference: Path, output_dir: Path, num_threads: int) -> dict[str, Any]:
    """
    Run the command, and read its peak memory from the system.

    Returns:
        `dict[str, Any]`: `seconds`, `peak_gb` of the largest process that was run, and `results`.
    """
    words = [sys.executable, "-m", "maetok_hf.commands.evaluate", "generation"]
    words += ["--samples", str(samples), "--reference", str(reference), "--metrics", *METRICS, "--device", "cpu"]
    words += ["--extractor", "benchmarks.evaluation_memory:LightExtractor", "--output_dir", str(output_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(num_threads)}
    start = time.perf_counter()
    subprocess.run(words, check=True, env=environment)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    results = json.loads((output_dir / "generation.json").read_text(encoding="utf-8"))["results"]
    return {"seconds": seconds, "peak_gb": peak, "results": results}


def random_inception(folder: Path) -> InceptionExtractor:
    """Inception with random weights, which takes as long as with the published ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    path = folder / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Fresh("fresh", ["2048"], feature_extractor_weights_path=path).state_dict(), path)
    return InceptionExtractor.from_file(path)


def inception_seconds(folder: Path) -> float:
    """Median seconds per image of Inception."""
    extractor = random_inception(folder)
    images = torch.from_numpy(np.stack(list(synthetic_images(INCEPTION_IMAGES, 2)))).permute(0, 3, 1, 2)
    extractor(images)
    seconds = []
    for _ in range(INCEPTION_REPEATS):
        start = time.perf_counter()
        extractor(images)
        seconds.append((time.perf_counter() - start) / INCEPTION_IMAGES)
    return statistics.median(seconds)


def report_of(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_set(folder / "samples.npz", args.num_images, 0)
    write_set(folder / "reference.npz", args.num_reference_images, 1)
    scored = score(folder / "samples.npz", folder / "reference.npz", folder / "scores", args.num_threads)
    torch.set_num_threads(args.num_threads)
    return {
        "command": COMMAND,
        "machine": machine("numpy", "torch-fidelity"),
        "num_threads": args.num_threads,
        "num_images": args.num_images,
        "num_reference_images": args.num_reference_images,
        "metrics": list(METRICS),
        **{name: scored[name] for name in ("seconds", "peak_gb")},
        "inception_seconds_per_image": inception_seconds(folder),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    count, of_reference = report["num_images"], report["num_reference_images"]
    inception = report["inception_seconds_per_image"]
    hours = inception * (count + of_reference) / 3600
    rows = [
        ["peak memory of the process", f"{report['peak_gb']:.2f} GB"],
        [f"below {LIMIT_GB:g} GB", "yes" if report["peak_gb"] < LIMIT_GB else "no"],
        ["time, with the light extractor", f"{report['seconds']:.0f} s"],
        ["Inception, one image", f"{1000 * inception:.0f} ms"],
        [f"Inception, {count + of_reference} images, computed from it", f"{hours:.1f} h"],
    ]
    return "\n".join(
        [
            f"# Scoring {count} images of {SIZE} x {SIZE}",
            "",
            f"`maetok-eval generation` on synthetic images in an `.npz` file of {count * SIZE**2 * 3 / 1e9:.1f} GB, "
            f"against {of_reference} others: {', '.join(report['metrics'])}. The light extractor's features have the "
            "sizes of Inception's: 2048 pooled, 2023 spatial, 1008 logits. Peak memory is that of the whole process, "
            "libraries included, as the system counts it.",
            "",
            *table(["", ""], rows),
            f"Written by `{report['command']}` with {report['num_threads']} threads on "
            f"{machine_line(report['machine'])}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the table is written.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/evaluation-memory"), help="Where images are kept meanwhile."
    )
    parser.add_argument("--num_images", type=int, default=50_000, help="Images that are scored.")
    parser.add_argument("--num_reference_images", type=int, default=10_000, help="Images of the reference.")
    parser.add_argument("--num_threads", type=int, default=os.cpu_count(), help="CPU threads.")
    args = parser.parse_args()
    report = report_of(args)
    write_results(args.results_dir, "evaluation_memory", report, to_markdown(report))
    shutil.rmtree(args.output_dir)
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
