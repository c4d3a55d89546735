"""Parameters that lie in pieces on several processes (FSDP2): made whole for files and measurements, and put back.

Everything here works on whole tensors as well, so nothing that calls it has to ask how a run is distributed. What
gathers or hands out pieces is a collective call: every process must make the same calls in the same order.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


if TYPE_CHECKING:
    from accelerate import Accelerator


def configure_sharding(accelerator: "Accelerator", supports_deepspeed: bool) -> None:
    """
    Refuse what a training script cannot run under, and keep FSDP2 from casting. Call it before `accelerator.prepare`.

    Accelerate would have FSDP2 cast parameters, inputs and outputs of the model and the summed gradients to the low
    precision: the images that losses are measured on, the losses, and the rotary frequencies. Here the forward pass
    runs under `accelerator.autocast()` instead, with the same values as in DDP.

    Args:
        accelerator (`Accelerator`): As the launcher configured it.
        supports_deepspeed (`bool`): Whether the script can train under DeepSpeed, which holds one model only.

    Raises:
        ValueError: If the launcher's configuration asks for FSDP1, for DeepSpeed and the script does not support it,
            or for DeepSpeed's ZeRO stage 3, which does not leave whole weights for checkpoints.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        if not supports_deepspeed:
            raise ValueError(
                "`distributed_type: DEEPSPEED` trains one model, and this script is made for two: launch it with "
                "`--config_file examples/accelerate_configs/ddp.yaml` or `fsdp2.yaml`."
            )
        if accelerator.state.deepspeed_plugin.zero_stage > 2:
            raise ValueError(
                f"`zero_stage` is {accelerator.state.deepspeed_plugin.zero_stage} but checkpoints need whole weights: "
                "set it to 2, or launch with `--config_file examples/accelerate_configs/fsdp2.yaml`."
            )
    elif accelerator.distributed_type == "FSDP":
        if not accelerator.is_fsdp2:
            raise ValueError(
                "`fsdp_version` is 1, whose parameters are flattened: set `fsdp_version: 2`, as "
                "examples/accelerate_configs/fsdp2.yaml does."
            )
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def configure_deepspeed(accelerator: "Accelerator", micro_batch_size: int, max_grad_norm: float) -> None:
    """
    Tell DeepSpeed, if the run is under it, what it does itself or asks for. Call it before `accelerator.prepare`.

    Args:
        accelerator (`Accelerator`): As the launcher configured it.
        micro_batch_size (`int`): Images in one forward pass of one process.
        max_grad_norm (`float`): Norm to which gradients are clipped, which DeepSpeed does in its own step.

    Raises:
        ValueError: If mixed precision is asked of accelerate: DeepSpeed would store the weights themselves in low
            precision. `deepspeed_zero2.json` has DeepSpeed compute under autocast instead.
    """
    if accelerator.distributed_type != "DEEPSPEED":
        return
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"`mixed_precision` is {accelerator.mixed_precision}, which would store the weights in low precision "
            "under DeepSpeed: leave it out, and set `torch_autocast` as "
            "examples/accelerate_configs/deepspeed_zero2.json does."
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_clipping"] = max_grad_norm


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """
    A tensor that may lie in pieces, such as the norm of sharded gradients, as an ordinary one.

    Args:
        tensor (`torch.Tensor`): Sharded or not.

    Returns:
        `torch.Tensor`: The whole tensor on every process; `tensor` itself if it was not sharded.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather_tensors(
    tensors: Mapping[str, torch.Tensor], device: torch.device | str = "cpu", keep: bool = True
) -> dict[str, torch.Tensor]:
    """
    Whole copies of tensors, gathered one by one.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): Sharded or not.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the copies are put.
        keep (`bool`, *optional*, defaults to `True`): Whether this process wants them; it must take part in any case.

    Returns:
        `dict[str, torch.Tensor]`: Contiguous copies that share no memory with `tensors`; empty if not `keep`.
    """
    copies = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if keep:
            copies[name] = whole.to(device, copy=True).contiguous()
    return copies


@torch.no_grad()
def load_tensors(targets: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """
    Copy whole values into tensors that may lie in pieces, in place.

    Args:
        targets (`Mapping[str, torch.Tensor]`): For example a module's `state_dict()`.
        values (`Mapping[str, torch.Tensor]`): Whole tensors of the same names, on every process.

    Raises:
        ValueError: If names or shapes differ.
    """
    if targets.keys() != values.keys():
        raise ValueError(
            f"the file and the module hold different tensors: {sorted(values.keys() - targets.keys())} are only in "
            f"the file, {sorted(targets.keys() - values.keys())} only in the module."
        )
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(values[name].shape)} in the file and {tuple(target.shape)} in the module."
            )
        value = _shard_like(target, values[name])
        if isinstance(target, DTensor):
            target, value = target.to_local(), value.to_local()
        target.copy_(value)


def whole_copy(
    model: ModelMixin, ema: EMAModel | None = None, device: torch.device | str = "cpu", keep: bool = True
) -> ModelMixin | None:
    """
    A copy of a model in evaluation mode that no other process is needed for, with its own or its averaged weights.

    Sharded models are whole only within the forward pass of the module that was prepared: anything else, encoding and
    decoding for a measurement as much as `save_pretrained`, is done with such a copy. The processes may then use it
    for different numbers of batches.

    Args:
        model (`ModelMixin`): The model, unwrapped.
        ema (`EMAModel`, *optional*): Its moving average, whose weights the copy gets.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the copy is put.
        keep (`bool`, *optional*, defaults to `True`): Whether this process wants the copy; it must take part in any
            case.

    Returns:
        `ModelMixin` or `None`: The copy, which shares no memory with `model` and `ema`; `None` if not `keep`.
    """
    tensors = dict(model.state_dict())
    if ema is not None:
        tensors |= named_averages(model, ema)
    tensors = gather_tensors(tensors, device, keep)
    if not keep:
        return None
    # `_name_or_path` may be a folder of this machine, and is not to travel with the copy
    config = {name: value for name, value in model.config.items() if name != "_name_or_path"}
    with torch.device("meta"):  # nothing is drawn, and no memory taken
        copy = type(model).from_config(config)
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False).eval()


class ShardedEMAModel(EMAModel):
    """
    Diffusers' moving average, of parameters that may lie in pieces: each process averages those it holds.

    A step is one pass over the memory, where that of `EMAModel` makes a copy of all parameters on the way. It works on
    the pieces as ordinary tensors, because the operations on lists of tensors are not all defined for sharded ones.
    The other methods, `copy_to`, `store` and `restore`, need whole parameters; [`whole_copy`] does not.
    """

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """
        Update the average.

        Args:
            parameters (`Iterable[nn.Parameter]`): The parameters that are averaged, in their order at creation. Frozen
                ones are copied.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained, frozen = [], []
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            (trained if parameter.requires_grad else frozen).append(
                (_piece(shadow), _piece(parameter).to(shadow.dtype))
            )
        if trained:
            shadows, pieces = zip(*trained, strict=True)
            torch._foreach_lerp_(shadows, pieces, 1 - self.cur_decay_value)
        if frozen:
            torch._foreach_copy_(*zip(*frozen, strict=True))


def _piece(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named_averages(model: ModelMixin, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averaged parameters of a model, not copied, by the names they have in its `state_dict`."""
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, ema.shadow_params, strict=True))


def gather_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any] | None:
    """
    The state of an optimiser as it would be if nothing were sharded.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser, also one that accelerate has wrapped.
        keep (`bool`, *optional*, defaults to `True`): Whether this process wants it; it must take part in any case.

    Returns:
        `dict` or `None`: In the form of `optimizer.state_dict()`, with tensors on the CPU; `None` if not `keep`.
    """
    state = optimizer.state_dict()
    parameters = {}
    for index, values in state["state"].items():
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        parameters[index] = values | gather_tensors(tensors, keep=keep)
    return state | {"state": parameters} if keep else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """
    Continue from what [`gather_optimizer_state`] returned, on any number of processes.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser, also one that accelerate has wrapped.
        state (`Mapping[str, Any]`): The whole state, on every process.
    """
    indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {}
    for index, parameter in zip(indices, parameters, strict=True):
        # moments have the shape of the parameter; step counts do not
        sharded[index] = {
            name: _shard_like(parameter, value) if _has_shape(value, parameter.shape) else value
            for name, value in state["state"].get(index, {}).items()
        }
    optimizer.load_state_dict({**state, "state": {index: values for index, values in sharded.items() if values}})


def _shard_like(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor cut into the pieces in which `target` lies, if it does."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device_mesh.device_type), target.device_mesh, target.placements)


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """
    Average gradients over all processes, for a module that is neither wrapped nor sharded.

    It is for small modules beside the one that is prepared, such as a discriminator: they may then be called from
    within another module's forward pass, and in any order. One call to the network, not overlapped with the backward
    pass.

    Args:
        parameters (`Iterable[nn.Parameter]`): Those of the module, the same on every process. Gradients of the last
            accumulated micro-batch must be there; parameters without one are left alone.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, average in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(average.view_as(gradient))
