"""What happens around the networks: loading images, caching latents, computing metrics; and one process or two."""

import concurrent.futures
import multiprocessing
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch

from maetok_hf.data import LatentLayout, ShardWriter
from maetok_hf.evaluation.distances import frechet_distance
from maetok_hf.evaluation.statistics import Moments
from maetok_hf.training.latent_encoding import ViewEncoder

from ..data_loading import Loader, make_jpegs, open_parquet
from ..evaluation_memory import random_inception
from .cases import Case, Settings, Work
from .models import NUM_CHANNELS, NUM_TOKENS, images, tokenizer


NUM_JPEGS, JPEG_QUALITY, LOADING_BATCH = 256, 90, 32
CACHE_BATCH = 4
FEATURES = 2048
MEETING_SECONDS = 300  # after which a process that waits for the others gives up
start: threading.Barrier  # of processes that encode together


def load_images(settings: Settings, num_workers: int) -> Work:
    folder = tempfile.mkdtemp()
    loader = Loader(
        open_parquet(make_jpegs(NUM_JPEGS, JPEG_QUALITY), Path(folder)), 256, LOADING_BATCH, num_workers, 1
    )
    count = 8 * num_workers

    def batches() -> None:
        for _ in range(count):
            next(loader.batches)

    return Work(batches, count * LOADING_BATCH, counted=False)


def cache_latents(settings: Settings, batch_size: int) -> Work:
    """Both views of images to latents, and these into a shard on the disk."""
    model = settings.prepare(tokenizer())
    encoder = ViewEncoder(model, 2, "float16")
    pixels = images(batch_size, 256, settings.torch_device, settings.torch_dtype)
    folder = Path(tempfile.mkdtemp())
    layout = LatentLayout(batch_size, NUM_TOKENS, NUM_CHANNELS, num_views=2, dtype="float16", class_names=("only",))
    indices = torch.arange(batch_size)

    @torch.no_grad()
    def cache() -> None:
        latents, _ = encoder(pixels)
        with ShardWriter(folder, layout, 0, "benchmark") as writer:
            writer.add(latents.numpy(), torch.zeros_like(indices).numpy(), indices.numpy())
            writer.finish(left_out=[], num_unlabeled=0, statistics=[])

    return Work(cache, batch_size, lambda: settings.compile(model.encoder))


def extract_features(settings: Settings, batch_size: int) -> Work:
    extractor = random_inception(Path(tempfile.mkdtemp())).to(settings.torch_device)
    pixels = (images(batch_size, 256, settings.torch_device, torch.float32) * 127.5 + 127.5).to(torch.uint8)
    return Work(lambda: extractor(pixels), batch_size, counted=False)


def fid(settings: Settings) -> Work:
    generator = torch.Generator().manual_seed(0)
    sets = []
    for _ in range(2):
        features = torch.randn(2 * FEATURES, FEATURES, generator=generator, dtype=torch.float64)
        sets.append(Moments(features.mean(0), torch.cov(features.T), len(features)))
    return Work(lambda: frechet_distance(*sets), 0, counted=False)


CPU = ("cpu",)
CASES = [
    *(
        Case(
            "data",
            f"streamed loading of JPEGs to 256 x 256, {number} worker{'s' * (number > 1)}",
            partial(load_images, num_workers=number),
            dtypes=("float32",),
            modes=("eager",),
            devices=CPU,
        )
        for number in (1, 2)
    ),
    *(
        Case("data", f"caching latents of both flips, ViT-B, 256 x 256, batch {batch}",
             partial(cache_latents, batch_size=batch), devices=devices)
        for batch, devices in ((CACHE_BATCH, CPU), (64, ("cuda",)))
    ),
    Case("data", "Inception features, batch 8", partial(extract_features, batch_size=8), dtypes=("float32",),
         modes=("eager",)),
    Case("data", f"FID of two sets of {FEATURES} features from their moments", fid, dtypes=("float32",),
         modes=("eager",), devices=CPU),
]  # fmt: skip


# one process or two


def meet_at(barrier: "threading.Barrier") -> None:
    """Give a process the barrier at which it waits for the others."""
    global start
    start = barrier


def encode_for(seconds: float, batch_size: int, num_threads: int) -> float:
    """What a process of the curve does: encode until the time is over; images a second."""
    torch.set_num_threads(num_threads)
    model = Settings("cpu", "float32", "eager").prepare(tokenizer())
    pixels = images(batch_size, 256, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model.encode(pixels)
        start.wait(MEETING_SECONDS)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            model.encode(pixels)
            count += batch_size
        return count / (time.perf_counter() - begin)


def encoding_rate(num_processes: int, num_threads: int, batch_size: int = 2, seconds: float = 15.0) -> float:
    """
    Images per second that processes encode together, which share the threads of one.

    Args:
        num_processes (`int`): How many.
        num_threads (`int`): CPU threads of all together.
        batch_size (`int`, *optional*, defaults to 2): Images of a call of each.
        seconds (`float`, *optional*, defaults to 15.0): How long.

    Returns:
        `float`: Images per second of all together.
    """
    context = multiprocessing.get_context("spawn")
    arguments = (seconds, batch_size, max(1, num_threads // num_processes))
    with concurrent.futures.ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=meet_at, initargs=(context.Barrier(num_processes),)
    ) as pool:  # the end of one process is an error in all
        return sum(one.result() for one in [pool.submit(encode_for, *arguments) for _ in range(num_processes)])
