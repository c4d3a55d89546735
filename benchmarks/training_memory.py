"""Peak memory of a training step of the published tokenizer, and the batches that fit cards of 24 and 80 GB.

On a CUDA device the peak is measured (`torch.cuda.max_memory_allocated`). Without one it is computed: the step runs on
tensors without values (torch's `FakeTensorMode`), and every storage that an operation makes counts from then until it
is released. What that leaves out is named in the result.

    python -m benchmarks.training_memory

writes `training_memory.json` and `.md`.
"""

import argparse
import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, machine, machine_line, table, write_results
from .training_step import TrainingStep, num_bytes, read_recipe


COMMAND = "python -m benchmarks.training_memory"
RECIPES = {256: "maetok-b-128-256", 512: "maetok-b-128-512"}
# decimal gigabytes: a card has a little more, which is part of the margin
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
MARGIN = 0.1
BATCHES = (8, 16)


class LiveBytes(TorchDispatchMode):
    """
    Bytes of the storages that operations have made while this mode is active and that are still alive.

    Attributes:
        live (`int`): Now.
        peak (`int`): The most so far; set it to `live` to begin anew.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size
