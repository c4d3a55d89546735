"""What several processes must do together, checked by every one of them. `test_sharding.py` starts two:

torchrun --nproc_per_node 2 sharded_run.py FOLDER
"""

import errno
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.training.checkpointing import Checkpointer, CheckpointError
from maetok_hf.training.optim import create_ema, weight_decay_groups
from maetok_hf.training.sharding import (
    average_gradients,
    configure_sharding,
    full_tensor,
    gather_optimizer_state,
    gather_tensors,
    whole_copy,
)


class Objective(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokenizer = AutoencoderMAE(
            sample_size=8,
            patch_size=4,
            latent_channels=2,
            num_latent_tokens=2,
            hidden_size=8,
            num_layers=1,
            num_attention_heads=1,
        )
        self.tokenizer.encoder.patch_embed.requires_grad_(False)
        self.heads = torch.nn.ModuleDict({"hog": torch.nn.Linear(2, 3)})

    def forward(self, images):
        mask = torch.zeros(len(images), 4, dtype=torch.bool)  # DDP wants every parameter to be used
        latent = self.tokenizer.encode(images, mask).latent
        return self.tokenizer.decode(latent).sample.square().mean() + self.heads["hog"](latent).square().mean()


def make_accelerator(sharded: bool) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True)
    if not sharded:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        return Accelerator(cpu=True)
    # as tests/examples/sharded_launch.py: accelerate shards on devices that have a distributed type of their own
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["TransformerBlock"],
    )
    return Accelerator(fsdp_plugin=plugin)


class Run:
    """A run whose step `i` depends on `i` and the process alone, with a small replicated module beside the model."""

    def __init__(self, folder: Path, sharded: bool, seed: int = 0):
        self.accelerator = make_accelerator(sharded)
        configure_sharding(self.accelerator, supports_deepspeed=False)
        torch.manual_seed(seed)
        objective, self.judge = Objective(), torch.nn.Linear(3 * 8 * 8, 1)
        self.model, self.heads = objective.tokenizer, objective.heads
        optimizer = torch.optim.AdamW(weight_decay_groups(objective, 0.1), lr=1e-2, fused=True)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.judge_optimizer = self.accelerator.prepare_optimizer(torch.optim.AdamW(self.judge.parameters(), lr=1e-2))
        assert isinstance(self.model.encoder.proj_out.weight, DTensor) == sharded
        self.ema = create_ema(self.model, 0.9)
        self.norms = []
        self.checkpointer = Checkpointer(
            self.accelerator,
            folder,
            {"seed": 0},
            models={"tokenizer": self.model},
            ema={"tokenizer": self.ema},
            modules={"auxiliary_decoders": self.heads, "judge": self.judge},
            total_limit=2,
        )

    def train(self, steps) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(step * 100 + self.accelerator.process_index)
            images = torch.randn(2, 3, 8, 8, generator=draw)
            self.accelerator.backward(self.objective(images))
            parameters = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
            self.norms.append(full_tensor(torch.nn.utils.clip_grad_norm_(parameters, 0.5)))
            self.judge(images.flatten(1)).square().mean().backward()
            average_gradients(self.judge.parameters())
            for optimizer in (self.optimizer, self.judge_optimizer):
                optimizer.step()
                optimizer.zero_grad()
            self.ema.step(self.model.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        modules = {"model": whole_copy(self.model), "average": whole_copy(self.model, self.ema), "judge": self.judge}
        state = {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
        }
        state |= gather_tensors(self.heads.state_dict())
        for number, optimizer in enumerate((self.optimizer, self.judge_optimizer)):
            for index, moments in gather_optimizer_state(optimizer)["state"].items():
                state |= {f"optimizer.{number}.{index}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in state.items()}


@contextmanager
def full_disk(owner: object, name: str, on_this_process: bool):
    def fail(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    if not on_this_process:
        yield
        return
    with patch.object(owner, name, fail):
        yield


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def check_resumption(folder: Path, sharded: bool) -> Run:
    whole = Run(folder / "whole", sharded)
    whole.train(range(3))
    first = Run(folder / "resumed", sharded)
    first.train(range(2))
    first.checkpointer.save(2, 1.5, extra={"skipped": 2})
    first.checkpointer.add_to_configs(2, {"tokenizer_ema": {"latents_std": 3.0}})
    resumed = Run(folder / "resumed", sharded, seed=1)
    assert resumed.checkpointer.load("latest") == (2, 1.5, {"skipped": 2})
    check_same(first.state(), resumed.state())
    resumed.train(range(2, 3))
    check_same(whole.state(), resumed.state())
    return whole


def check_same_as_replicated(folder: Path, sharded: Run) -> None:
    replicated = check_resumption(folder / "replicated", sharded=False)
    expected, got = replicated.state(), sharded.state()
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.stack(sharded.norms), torch.stack(replicated.norms))


def check_continued_in_another_layout(folder: Path) -> None:
    states = []
    for sharded in (True, False):
        run = Run(folder / "resumed", sharded, seed=2)
        run.checkpointer.load("checkpoint-2")
        states.append(run.state())
    check_same(*states)


def check_folders(folder: Path) -> None:
    run = Run(folder / "resumed", sharded=True, seed=3)
    run.checkpointer.load("latest")
    for name, ema in (("tokenizer", None), ("tokenizer_ema", run.ema)):
        loaded = AutoencoderMAE.from_pretrained(folder / "resumed" / "checkpoint-2" / name)
        check_same(loaded.state_dict(), whole_copy(run.model, ema).state_dict())
        assert loaded.config.latents_std == (None if ema is None else 3.0)


def check_measuring_alone(run: Run) -> None:
    """Once a copy is made, one process may go on measuring while the other has no images left."""
    copy = whole_copy(run.model, run.ema)
    if run.accelerator.is_main_process:
        assert copy(torch.zeros(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)
    only_main = whole_copy(run.model, keep=run.accelerator.is_main_process)
    assert (only_main is not None) == run.accelerator.is_main_process


def check_full_disk(folder: Path) -> None:
    """Whatever process runs out of space, and at whatever file, all of them say so and the last checkpoint stays."""
    from diffusers import ModelMixin

    run = Run(folder / "full", sharded=True)
    run.train(range(1))
    run.checkpointer.save(1, 0.0)
    saved = run.state()
    run.train(range(1, 2))
    rank = run.accelerator.process_index
    for owner, name, where in ((ModelMixin, "save_pretrained", 0), (torch, "save", 0), (torch, "save", 1)):
        with full_disk(owner, name, rank == where):
            try:
                run.checkpointer.save(2, 0.0)
            except CheckpointError as error:
                assert f"(process {where}: " in str(error), error
                assert ("No space left" if rank == where else "see its own message") in str(error), error
            else:
                raise AssertionError(f"{name} failed on process {where} and nobody noticed")
        run.accelerator.wait_for_everyone()
        assert {path.name for path in (folder / "full").iterdir()} == {"checkpoint-1"}
        run.accelerator.wait_for_everyone()  # before the next save begins to write
    resumed = Run(folder / "full", sharded=True, seed=1)
    assert resumed.checkpointer.load("latest").step == 1
    check_same(saved, resumed.state())


def check_averages() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    rank = PartialState().process_index
    for number, parameter in enumerate(module[0].parameters()):
        parameter.grad = torch.full_like(parameter, 10.0 * number + rank)
    average_gradients(module.parameters())
    for number, parameter in enumerate(module[0].parameters()):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 10.0 * number + 0.5))
    assert all(parameter.grad is None for parameter in module[1].parameters())


def check_folder_of_their_own(folder: Path) -> None:
    """Processes of a machine that does not share the folder end the run on all of them, before it begins."""
    rank = PartialState().process_index
    run = Run(folder / f"of_process_{rank}", sharded=True)
    run.checkpointer.output_dir.mkdir()
    try:
        run.checkpointer.load("latest")
    except CheckpointError as error:
        assert "(process 1: " in str(error), error
        assert ("use a shared file system" in str(error)) == (rank == 1), error
    else:
        raise AssertionError("nobody noticed that the folders differ")


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sharded = check_resumption(folder, sharded=True)
    check_averages()
    check_measuring_alone(sharded)
    check_same_as_replicated(folder, sharded)
    check_continued_in_another_layout(folder)
    check_folders(folder)
    check_full_disk(folder)
    check_folder_of_their_own(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
