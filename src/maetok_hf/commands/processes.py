"""The processes of a command: one, or those that `accelerate launch` started."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..training.interruption import StopRequest


# for processes that wait at the start while another one downloads weights
START_TIMEOUT = timedelta(days=1)


class Processes:
    """
    What a process knows of itself and of the others.

    Each stops for itself when a signal comes, so that none waits for a slower one.

    Args:
        device (`str`, *optional*, defaults to `"auto"`): `"auto"`, `"cpu"` or `"cuda"`.

    Raises:
        ValueError: If there is no CUDA device and one is asked for, or the launcher has a precision, which would be
            ignored.
    """

    def __init__(self, device: str = "auto"):
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched != "no":
            raise ValueError(
                f"`mixed_precision` of the launcher is {launched!r}, which has no effect here: launch with "
                "`--mixed_precision no`."
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` is 'cuda', but torch finds no CUDA device: choose 'cpu' or 'auto'.")
        self.stop = StopRequest()  # before there is a process group, which it would ask at every batch
        several = "LOCAL_RANK" in os.environ
        self._state = PartialState(cpu=device == "cpu", **({"timeout": START_TIMEOUT} if several else {}))
        self.rank, self.world_size = self._state.process_index, self._state.num_processes
        self.device = self._state.device
        if device == "cuda" and self.device.type != "cuda":
            raise ValueError(
                f"`device` is 'cuda', but the launcher chose {self.device.type!r}: launch without its flag `--cpu`."
            )

    @property
    def is_main(self) -> bool:
        """`bool`: Whether this is the process that writes results."""
        return self.rank == 0

    @property
    def metric_device(self) -> torch.device:
        """`torch.device`: Where distances are computed in float64, which not all accelerators have."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def share(self, value: Any) -> Any:
        """
        What the main process has, on all of them; all must call it at the same point.

        Args:
            value (`Any`): The value, which is read on the main process only and can be pickled.

        Returns:
            `Any`: That of the main process.
        """
        return broadcast_object_list([value])[0] if self.world_size > 1 else value

    def shares(self) -> Mapping[str, Any]:
        """The arguments of [`~maetok_hf.evaluation.feature_run.FeatureRun`] that divide the work."""
        return {"rank": self.rank, "world_size": self.world_size, "share": self.share}

    def release(self) -> None:
        """Give the signals their former effect, at the end of the command."""
        self.stop.release()
