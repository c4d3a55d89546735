"""What a case of the suite is: how it is built, under which settings, and what it says about itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..training_step import keys_as_on_a_gpu


MAX_AUTOTUNE, CUDA_GRAPHS = "max-autotune", "cuda-graphs"
COMPILE_MODES = {"compiled": None, MAX_AUTOTUNE: "max-autotune-no-cudagraphs", CUDA_GRAPHS: "reduce-overhead"}
MODES = ("eager", *COMPILE_MODES)
USUAL_MODES = ("eager", "compiled", CUDA_GRAPHS)  # max-autotune takes minutes to compile
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """
    Under what a case is measured.

    Args:
        device (`str`): `"cpu"` or `"cuda"`.
        dtype (`str`): Type of weights and activations; in training, that of autocast over float32 weights.
        mode (`str`): `"eager"`, `"compiled"`, `"max-autotune"`, for which the compiler tries kernels of its own for
            every product, or `"cuda-graphs"`: compiled, and replayed as CUDA graphs.
    """

    device: str
    dtype: str
    mode: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def place(self, module: nn.Module) -> nn.Module:
        """A module for inference on the device and in the type; what must be precise in a model of ours stays so."""
        precise = [name for name, _ in module.named_parameters() if name.rsplit(".", 1)[-1] == "freqs"]
        module = module.to(self.torch_device)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name not in precise and tensor.is_floating_point():
                tensor.data = tensor.data.to(self.torch_dtype)
        return module.eval().requires_grad_(False)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Place a module, with queries, keys and values in one product, which is faster in every mode."""
        self.place(module).fuse_qkv_projections()
        return module

    def compile(self, *modules: nn.Module) -> None:
        """Compile modules for inference, in place; on a CPU with weights as constants (docs/performance.md)."""
        if self.device == "cpu":
            inductor_config.freezing = True  # in `options` it would not reach Dynamo, and nothing would be frozen
        for module in modules:
            module.compile(fullgraph=True, mode=COMPILE_MODES[self.mode])


def count_flops(run: Callable[[], Any]) -> int:
    """
    Operations of a call: products of matrices, attention and convolutions, a multiply-add being two. Keys that are
    padding do not count.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), keys_as_on_a_gpu():
        run()
    return counter.get_total_flops()


@dataclass
class Work:
    """
    A case that is built.

    Args:
        run (`Callable[[], Any]`): A call that is timed.
        images (`int`): Images of a call.
        compile (`Callable[[], None]`, *optional*): Compiles what `run` uses, in place. Without it the case has no
            compiled mode.
        counted (`bool`, *optional*, defaults to `True`): Whether operations are counted and a share is formed.
        count (`Callable[[], int]`, *optional*): Counts them, in the place of running `run` while that is watched.
        rival (`Callable[[], Any]`, *optional*): The same by the naive form, timed in turn with `run`.
        warm (`Callable[[], Any]`, *optional*): A shorter call that is the first one, warms up and whose memory is
            looked at, in the place of `run`.
    """

    run: Callable[[], Any]
    images: int
    compile: Callable[[], None] | None = None
    counted: bool = True
    count: Callable[[], int] | None = None
    rival: Callable[[], Any] | None = None
    warm: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        self.warm = self.warm or self.run

    def flops(self) -> int | None:
        """Operations of a call, `None` if they are not counted. Call it before anything is compiled."""
        if not self.counted:
            return None
        return count_flops(self.run) if self.count is None else self.count()


@dataclass(frozen=True)
class Case:
    """
    Something to measure.

    Args:
        group (`str`): What it belongs to; a table of the results.
        name (`str`): What it is, with its sizes.
        build (`Callable[[Settings], Work]`): Makes it.
        dtypes, modes, devices (`Sequence[str]`): Where it makes sense. On other devices of the suite it is "not
            measured". CUDA graphs are of CUDA only.
        point (`float`, *optional*): Where it lies on the curve of its group, if that is one.
        curve (`str`, *optional*): What is the same on this curve.
    """

    group: str
    name: str
    build: Callable[[Settings], Work]
    dtypes: Sequence[str] = DTYPES
    modes: Sequence[str] = USUAL_MODES
    devices: Sequence[str] = DEVICES
    point: float | None = None
    curve: str = ""

    def settings(self, devices: Sequence[str], dtypes: Sequence[str], modes: Sequence[str]) -> list[Settings]:
        """All settings of a selection under which it is measured."""
        return all_settings(
            [device for device in self.devices if device in devices],
            [dtype for dtype in self.dtypes if dtype in dtypes],
            [mode for mode in self.modes if mode in modes],
        )


def all_settings(devices: Sequence[str], dtypes: Sequence[str], modes: Sequence[str]) -> list[Settings]:
    """Every combination that exists."""
    return [
        Settings(device, dtype, mode)
        for device in devices
        for dtype in dtypes
        for mode in modes
        if mode != CUDA_GRAPHS or device == "cuda"
    ]


def key_of(record: dict[str, Any]) -> str:
    """The name of a record, the same in every run of the suite."""
    return " / ".join(str(record[part]) for part in ("group", "case", "device", "dtype", "mode"))
