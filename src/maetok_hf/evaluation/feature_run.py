"""
Features of exactly N images by any number of processes, which continue after a stop or a kill: `FeatureRun`.

Every process does this, and the main one gets the result:

```python
processes = Processes(device)  # of maetok_hf.commands.processes
run = FeatureRun(folder, len(images), protocol, ("pool",), ("logits",), **processes.shares())
run.collect(images, extractor, batch_size, stop=processes.stop)
if processes.is_main:
    collector = run.result(stop=processes.stop)  # a FeatureCollector of all images
```

What lies in `folder`: while a run is on, `process-0003/part-0001.npz`, the images that process 3 counted in the first
attempt, and in the end `features.npz` with everything. An attempt writes its own parts and never those of an earlier
one, whose images it leaves out. So a kill at any moment costs what was not yet saved, and no image is counted twice.

Processes wait for each other in the constructor only. Where several runs follow each other, make them all before the
first one collects.
"""

import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training.interruption import RunLock, StopRequest
from ..training.progress import ProgressBar
from ..training.resumption import check_identity
from .collection import FeatureCollector, collect_features
from .image_sets import ImageReader, split_rows


FEATURES_FILE = "features.npz"
SECONDS_BETWEEN_SAVES = 60.0
# a save waits for as many times as long as the last one took, so that saving costs a twentieth at most
SAVES_APART = 20.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_REPORTS = 10.0


class FeatureRun:
    """
    Statistics and features of a set, collected by several processes and kept in a folder until they are complete.

    Every process of a run makes one with the same arguments but `rank`, at the same point of its program.

    Args:
        folder (`str` or `Path`): Where parts and result are kept, on a file system that all processes share. For this
            set alone.
        num_images (`int`): Images of the set.
        protocol (`Mapping[str, Any]`): What the features depend on, such as the digest of the extractor and the
            identity of the images; plain types. What is in the folder must be of the same.
        statistics (`Sequence[str]`, *optional*, defaults to `("pool", "spatial")`): Layers whose mean and covariance
            are computed.
        keep (`Sequence[str]`, *optional*, defaults to `("pool", "logits")`): Layers whose features are kept.
        rank (`int`, *optional*, defaults to 0): Number of this process; 0 is the main one.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        share (`Callable[[Any], Any]`, *optional*): Gives every process what the main one calls it with, by default
            what it is called with, for one process.
        description (`str`, *optional*, defaults to `"images"`): What is counted, for the progress bar.

    Raises:
        ValueError: If the folder holds features of another protocol or other layers, or a process of an earlier
            attempt still works on them.
    """

    def __init__(
        self,
        folder: str | Path,
        num_images: int,
        protocol: Mapping[str, Any],
        statistics: Sequence[str] = ("pool", "spatial"),
        keep: Sequence[str] = ("pool", "logits"),
        *,
        rank: int = 0,
        world_size: int = 1,
        share: Callable[[Any], Any] = lambda value: value,
        description: str = "images",
    ):
        self.folder, self.description = Path(folder), description
        self.rank, self.world_size = rank, world_size
        self._collector = FeatureCollector(num_images, statistics, keep)
        layers = {"statistics": list(statistics), "keep": list(keep)}
        self._identity = json.loads(json.dumps({**protocol, "layers": layers, "num_images": num_images}))
        self._lock: RunLock | None = None
        if rank == 0:
            self._lock_folder()
        # The only time that processes wait for each other: all must leave out the same images.
        self._attempt, self._seen = share(self._plan() if rank == 0 else None)
        self._num_collected, self._seconds, self._next_save = 0, 0.0, 0.0

    @property
    def num_images(self) -> int:
        """`int`: Images of the set."""
        return len(self._seen)

    @property
    def num_missing(self) -> int:
        """`int`: Images that were not there when this attempt began."""
        return int(np.count_nonzero(~self._seen))

    @property
    def seconds_per_image(self) -> float | None:
        """`float`, *optional*: What an image took this process in this attempt; `None` if it had none."""
        return self._seconds / self._num_collected if self._num_collected else None

    def collect(
        self,
        images: ImageReader,
        extractor: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
        batch_size: int,
        stop: StopRequest | None = None,
    ) -> None:
        """
        Count this process's share of the images that are missing, and save them.

        Args:
            images ([`ImageReader`]): The set.
            extractor (`Callable`): Makes a dict of layers, `(n, dim)` each, of uint8 images of shape `(n, 3, height,
                width)`: a [`FeatureExtractor`], or any function.
            batch_size (`int`): Images at a time.
            stop (`StopRequest`, *optional*): Of this process. When it has received a signal, what was counted is saved
                and the process ends after the batch at hand.

        Raises:
            ValueError: If the set has another size, an image cannot be read, or a layer is missing or not finite.
            SystemExit: After a signal.
        """
        batches = list(split_rows(self.num_images, batch_size, self.rank, self.world_size, self._seen))
        if not batches:
            return
        if self._lock is None:
            self._lock_folder()
        bar = ProgressBar(len(batches), 0, f"{self.description}, batches of this process", enabled=self.rank == 0)
        start = reported = time.monotonic()
        done = 0
        self._next_save = start + SECONDS_BETWEEN_SAVES

        def after_batch(count: int) -> None:
            nonlocal done, reported
            done, now = done + 1, time.monotonic()
            self._num_collected += count
            self._seconds = now - start
            bar.advance()
            if now - reported >= SECONDS_BETWEEN_REPORTS or done == len(batches):
                bar.report(done, {"images/s": self._num_collected / self._seconds})
                reported = now
            if done == len(batches) or now >= self._next_save or (stop is not None and stop.agreed()):
                self._save()
            stop_if_asked(stop, self.rank == 0)

        rank_and_size = (self.rank, self.world_size)
        collect_features(images, extractor, self._collector, batch_size, *rank_and_size, after_batch, self._seen)
        bar.close()

    def result(self, stop: StopRequest | None = None) -> FeatureCollector:
        """
        Wait for the parts of all processes, and join them into `features.npz`; on the main process only.

        Args:
            stop (`StopRequest`, *optional*): Of this process; it is looked at while waiting.

        Returns:
            [`FeatureCollector`]: All images.

        Raises:
            ValueError: If the files in the folder do not fit together.
            SystemExit: After a signal.
        """
        path = self.folder / FEATURES_FILE
        if path.is_file():
            return FeatureCollector.load(path, self._identity)
        self._wait(stop)
        self._collector = FeatureCollector.merged(
            FeatureCollector.load(part, self._identity) for part in self._parts()
        )
        self._collector.save(path, self._identity)
        self._remove_parts()
        return self._collector

    def remove(self) -> None:
        """Remove the result, once nothing is to be computed of it any more; on the main process only."""
        (self.folder / FEATURES_FILE).unlink(missing_ok=True)
        self._remove_parts()

    def _plan(self) -> tuple[int, np.ndarray]:
        """On the main process: number of this attempt, and the images of earlier ones."""
        for folder in self._process_folders():
            if folder != self._own_folder:
                RunLock(folder).release()  # waits for the process to end
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("process-*/.*.tmp")]:
            path.unlink()
        if (self.folder / FEATURES_FILE).is_file():
            seen = self._seen_in(self.folder / FEATURES_FILE)
            self._remove_parts()  # which a kill left beside it
            return 0, seen
        seen, attempts = np.zeros(self._collector.num_images, dtype=bool), [0]
        for part in self._parts():
            found = self._seen_in(part)
            if (seen & found).any():
                raise ValueError(f"{part} has images that another part in {self.folder} has, too: remove one of them.")
            seen |= found
            attempts.append(int(part.stem.removeprefix("part-")))
        return max(attempts) + 1, seen

    @property
    def _own_folder(self) -> Path:
        return self.folder / f"process-{self.rank:04d}"

    def _lock_folder(self) -> None:
        self._own_folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self._own_folder)

    def _process_folders(self) -> list[Path]:
        return sorted(self.folder.glob("process-*"))

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("process-*/part-*.npz"))

    def _seen_in(self, path: Path) -> np.ndarray:
        """Which images a file has; the rest of it is not read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                check_identity(path, json.loads(str(file["protocol"])), self._identity)
                return file["seen"]
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and its images are counted again.") from error

    def _save(self) -> None:
        start = time.monotonic()
        self._collector.save(self._own_folder / f"part-{self._attempt:04d}.npz", self._identity)
        now = time.monotonic()
        self._next_save = now + max(SECONDS_BETWEEN_SAVES, SAVES_APART * (now - start))

    def _wait(self, stop: StopRequest | None) -> None:
        """Look until the parts have all images: a collective would give up after some minutes."""
        found: dict[tuple[Path, int], int] = {}
        told = False
        while True:
            parts = [(part, part.stat().st_mtime_ns) for part in self._parts()]
            found = {part: found.get(part) or int(self._seen_in(part[0]).sum()) for part in parts}
            missing = self.num_images - sum(found.values())
            if missing <= 0:
                return
            if not told:
                print(f"Waiting for {missing} {self.description} of the other processes.", flush=True)
                told = True
            stop_if_asked(stop, main=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _remove_parts(self) -> None:
        for folder in self._process_folders():
            shutil.rmtree(folder, ignore_errors=True)


def stop_if_asked(stop: StopRequest | None, main: bool) -> None:
    """
    End the process if a signal has asked for it.

    Args:
        stop (`StopRequest`, *optional*): Of this process.
        main (`bool`): Whether to say so.

    Raises:
        SystemExit: With 128 more than the number of the signal.
    """
    number = 0 if stop is None else stop.agreed()
    if number:
        if main:
            print(f"Stopped by signal {number}: the same command continues.", flush=True)
        raise SystemExit(128 + number)
