"""Does the streamed loader deliver what its processors can decode?

The bare rate is that of processes which do nothing but decode a JPEG of 500 x 375 pixels from memory, crop it as ADM
does and make a uint8 tensor of it: in the usual way (`plain`), and by the library's own transform (`transform`), which
gives the same pixels a little sooner. Against both stands `StreamingImages` with as many data workers, over a parquet
file and over a data set in memory, as in training: shuffled in blocks, keyed flips, batches for the main process.

They are measured in turn, so that whatever else the machine does slows all of them, and the ratio of neighbors is what
counts. Processor time (of the workers and the main process together) is less disturbed by other jobs than the clock,
and its ratio is the rate that is left where nothing but the processors limits it.

    python -m benchmarks.data_loading --output benchmarks/results/data_loading.json

The photographs are the two that come with scikit-learn (`maetok_hf[demo]`), cut at many places.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import PIL.Image
import psutil
import torch

from benchmarks.machine import machine, machine_line, table, write_results
from maetok_hf.data import ImageSource, ImageTransform, StreamingImages, open_images
from maetok_hf.data.transforms import resize_short_side


WIDTH, HEIGHT = 500, 375
PREFETCH_FACTOR = 2
ROW_GROUP_SIZE = 100  # as the parquet files of the Hub


def make_jpegs(count: int, quality: int) -> list[bytes]:
    """Pieces of photographs as JPEG files."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top = generator.integers(photograph.shape[0] - HEIGHT + 1)
        left = generator.integers(photograph.shape[1] - WIDTH + 1)
        file = io.BytesIO()
        piece = np.ascontiguousarray(photograph[top : top + HEIGHT, left : left + WIDTH])
        PIL.Image.fromarray(piece).save(file, format="JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def open_in_memory(jpegs: list[bytes]) -> ImageSource:
    """The files as a map-style data set."""
    from datasets import Dataset, Features, Image, Value

    rows = {"image": [{"bytes": jpeg, "path": None} for jpeg in jpegs], "label": [i % 1000 for i in range(len(jpegs))]}
    return open_images(Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})))


def open_parquet(jpegs: list[bytes], folder: Path) -> ImageSource:
    """The files as a parquet file, which the system keeps in memory once it has been read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg, "path": f"{number}.jpg"} for number, jpeg in enumerate(jpegs)]
    table = pa.table({"image": images, "label": [number % 1000 for number in range(len(jpegs))]})
    pq.write_table(table, folder / "train.parquet", row_group_size=ROW_GROUP_SIZE)
    return open_images(folder, cache_dir=folder / "counts")


def plain(jpeg: bytes, resolution: int) -> torch.Tensor:
    """Decode, resize, crop and make a tensor, as one writes it down."""
    image = resize_short_side(PIL.Image.open(io.BytesIO(jpeg)), resolution)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def transform(jpeg: bytes, resolution: int) -> torch.Tensor:
    """The same by the library."""
    return ImageTransform(resolution).to_uint8(PIL.Image.open(io.BytesIO(jpeg)))


BARE = {"plain": plain, "transform": transform}


def bare_process(
    make: Callable[[bytes, int], torch.Tensor],
    jpegs: list[bytes],
    resolution: int,
    start: Any,
    commands: Any,
    results: Any,
) -> None:
    """Makes as many images as each command says and answers with the seconds and processor seconds it took."""
    torch.set_num_threads(1)
    position = 0
    while (count := commands.get()) is not None:
        start.wait()
        seconds, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            make(jpegs[position % len(jpegs)], resolution)
            position += 1
        results.put((time.perf_counter() - seconds, time.process_time() - processor))


class Bare:
    """The processes of the bare rate, waiting between measurements."""

    def __init__(self, make: Callable, jpegs: list[bytes], resolution: int, num_processes: int):
        context = multiprocessing.get_context("fork")
        start, self.results = context.Barrier(num_processes), context.Queue()
        self.commands = [context.Queue() for _ in range(num_processes)]
        self.processes = []
        for number, commands in enumerate(self.commands):
            share = jpegs[number::num_processes]
            arguments = (make, share, resolution, start, commands, self.results)
            self.processes.append(context.Process(target=bare_process, args=arguments, daemon=True))
            self.processes[-1].start()

    def measure(self, num_images: int) -> tuple[float, float]:
        """Images per second of all processes, and processor seconds per image."""
        count = num_images // len(self.commands)
        for commands in self.commands:
            commands.put(count)
        seconds, processor = zip(*(self.results.get() for _ in self.commands), strict=True)
        return sum(count / taken for taken in seconds), sum(processor) / (count * len(self.commands))

    def close(self) -> None:
        for commands, process in zip(self.commands, self.processes, strict=True):
            commands.put(None)
            process.join()


class Loader:
    """A running loader, its workers waiting with full queues between measurements."""

    def __init__(self, source: ImageSource, resolution: int, batch_size: int, num_workers: int, block_size: int):
        images = StreamingImages(
            source,
            resolution=resolution,
            batch_size=batch_size,
            seed=0,
            num_workers=num_workers,
            block_size=block_size,
        )
        others = set(psutil.Process().children())
        self.batches: Iterator[dict] = iter(images.dataloader(prefetch_factor=PREFETCH_FACTOR))
        self.processes = [psutil.Process(), *(set(psutil.Process().children()) - others)]
        self.batch_size, self.num_workers = batch_size, num_workers
        self.measure(2 * num_workers * batch_size)

    def processor_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def settle(self) -> None:
        """Wait until the workers have filled their queues."""
        before = -1.0
        while before != (before := self.processor_seconds()):
            time.sleep(0.2)

    def measure(self, num_images: int) -> tuple[float, float]:
        """Images per second, and processor seconds of workers and main process per image."""
        # What lies in the queues was made before; two further rounds bring the workers into their stride.
        for _ in range((PREFETCH_FACTOR + 2) * self.num_workers):
            next(self.batches)
        rounds = max(1, num_images // (self.batch_size * self.num_workers))
        count = rounds * self.num_workers * self.batch_size
        seconds, processor = time.perf_counter(), self.processor_seconds()
        for _ in range(rounds * self.num_workers):
            next(self.batches)
        seconds, processor = time.perf_counter() - seconds, self.processor_seconds() - processor
        self.settle()
        return count / seconds, processor / count


def summary(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median and spread."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    found = {"median": quartiles[1], "quartile_1": quartiles[0], "quartile_3": quartiles[2]}
    return {name: round(value, digits) for name, value in (found | {"min": min(values), "max": max(values)}).items()}


def compare(measures: dict[str, Callable], num_images: int, num_rounds: int) -> dict[str, Any]:
    """Measures all in turn, in an order that changes from round to round, and sets the last against the others."""
    names, found = list(measures), {name: [] for name in measures}
    for number in range(-1, num_rounds):
        for place in range(len(names)):
            name = names[(number + place) % len(names)]
            measured = measures[name](num_images)
            if number >= 0:  # the first round warms up
                found[name].append(measured)
    result: dict[str, Any] = {}
    for name in names:
        result[name] = {
            "images_per_second": summary([rate for rate, _ in found[name]], 1),
            "processor_milliseconds_per_image": summary([1000 * seconds for _, seconds in found[name]]),
        }
    for name in names[:-1]:
        pairs = list(zip(found[names[-1]], found[name], strict=True))
        result[f"{names[-1]}_to_{name}"] = {
            "by_the_clock": summary([one[0] / other[0] for one, other in pairs]),
            "by_processor_time": summary([other[1] / one[1] for one, other in pairs]),
        }
    return result


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def describe(result: dict[str, Any]) -> str:
    """The result in words and a table."""
    settings, facts, rows, rates = result["settings"], result["machine"], [], []
    for source in ("parquet", "in_memory"):
        for bare in BARE:
            ratios = result[source][f"loader_to_{bare}"].values()
            cells = [f"{r['median']:.3f} ({r['quartile_1']:.3f} to {r['quartile_3']:.3f})" for r in ratios]
            rows.append([source.replace("_", " "), bare, *cells])
            rates += [result[source][bare]["images_per_second"][end] for end in ("min", "max")]
    size, resolution = result["mean_file_bytes"] / 1000, settings["resolution"]
    lines = [
        "# The streamed loader against the bare rate",
        "",
        f"JPEG files of {WIDTH} x {HEIGHT} pixels ({size:.0f} kB on average) to uint8 tensors of {resolution} x "
        f"{resolution}: {settings['num_workers']} workers against as many processes, batches of "
        f"{settings['batch_size']}. Medians and quartiles of {settings['num_rounds']} rounds.",
        "",
        *table(["source", "bare rate", "ratio by the clock", "ratio by processor time"], rows),
        f"The bare rates themselves were between {min(rates):.0f} and {max(rates):.0f} images per second, at load "
        f"averages of {facts['load_average'][0]} (begin) and {facts['load_average_at_the_end'][0]} (end).",
        "",
        f"Measured on {machine_line(facts)}, libjpeg-turbo {facts['libjpeg_turbo']}, by",
        "`python -m benchmarks.data_loading --output benchmarks/results/data_loading.json`.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result, with a page beside it")
    parser.add_argument("--num_workers", type=int, default=2, help="data workers, and processes of the bare rate")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--num_files", type=int, default=2048, help="different JPEG files")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files")
    parser.add_argument("--num_images", type=int, default=1024, help="images of one measurement")
    parser.add_argument("--num_rounds", type=int, default=11, help="measurements of each kind")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"settings": {k: v for k, v in vars(arguments).items() if k != "output"}}
    jpegs = make_jpegs(arguments.num_files, arguments.quality)
    result["mean_file_bytes"] = round(sum(map(len, jpegs)) / len(jpegs))
    result["machine"] = machine("pillow", "numpy", "pyarrow", "datasets") | {
        "libjpeg_turbo": PIL.features.version("libjpeg_turbo"),
        "load_average": load_average(),
    }
    bare = {name: Bare(make, jpegs, arguments.resolution, arguments.num_workers) for name, make in BARE.items()}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"parquet": open_parquet(jpegs, Path(folder)), "in_memory": open_in_memory(jpegs)}
        for name, source in sources.items():
            loader = Loader(
                source, arguments.resolution, arguments.batch_size, arguments.num_workers, arguments.block_size
            )
            measures = {kind: processes.measure for kind, processes in bare.items()} | {"loader": loader.measure}
            result[name] = compare(measures, arguments.num_images, arguments.num_rounds)
            print(name, json.dumps(result[name], indent=2), flush=True)
            del measures, loader  # ends its workers
    for processes in bare.values():
        processes.close()
    result["machine"]["load_average_at_the_end"] = load_average()
    if arguments.output is not None:
        write_results(arguments.output.parent, arguments.output.stem, result, describe(result))


if __name__ == "__main__":
    main()
