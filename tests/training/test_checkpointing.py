"""Checkpoints are complete or absent; a run continues exactly, or refuses with the reason."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from maetok_hf.data import open_images
from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.training import checkpointing
from maetok_hf.training.checkpointing import (
    Checkpointer,
    CheckpointError,
    complete_checkpoints,
    data_identity,
    export,
    model_digest,
)
from maetok_hf.training.optim import create_ema
from maetok_hf.training.resumption import check_identity


IDENTITY = {"recipe": {"learning_rate": 1e-3, "max_train_steps": 10}, "seed": 0}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A training run of a tiny tokenizer, whose step `i` depends on `i` alone."""

    def __init__(self, folder, identity=IDENTITY, total_limit=2, accumulation=1, seed=0):
        torch.manual_seed(seed)
        self.model = AutoencoderMAE(
            sample_size=8,
            patch_size=4,
            latent_channels=2,
            num_latent_tokens=2,
            hidden_size=8,
            num_layers=1,
            num_attention_heads=1,
        )
        self.heads = torch.nn.ModuleDict({"hog": torch.nn.Linear(2, 3)})
        self.judge = torch.nn.Linear(2, 1)  # a second trained module, with an optimiser of its own
        objective = torch.nn.ModuleList([self.model, self.heads])
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
        self.prepared, self.optimizer = self.accelerator.prepare(objective, self.optimizer)
        self.judge_optimizer = self.accelerator.prepare_optimizer(torch.optim.AdamW(self.judge.parameters(), lr=1e-2))
        self.ema = create_ema(self.model, 0.9)
        self.checkpointer = Checkpointer(
            self.accelerator,
            folder,
            identity,
            models={"tokenizer": self.model},
            ema={"tokenizer": self.ema},
            modules={"auxiliary_decoders": self.heads, "judge": self.judge},
            total_limit=total_limit,
        )

    def train(self, steps):
        for step in steps:
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            latent = self.model.encode(images).latent
            loss = self.model.decode(latent).sample.square().mean() + self.heads["hog"](latent).square().mean()
            self.accelerator.backward(loss)
            self.judge(latent.detach()).square().mean().backward()
            for optimizer in (self.optimizer, self.judge_optimizer):
                optimizer.step()
                optimizer.zero_grad()
            self.ema.step(self.model.parameters())

    def state(self):
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        tensors |= {f"ema.{number}": value for number, value in enumerate(self.ema.shadow_params)}
        tensors |= {f"judge.{name}": value for name, value in self.judge.state_dict().items()}
        for which, optimizer in enumerate((self.optimizer, self.judge_optimizer)):
            for number, moments in enumerate(optimizer.state_dict()["state"].values()):
                tensors |= {f"optimizer.{which}.{number}.{name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in tensors.items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    uninterrupted = Run(tmp_path / "a")
    uninterrupted.train(range(6))

    first = Run(tmp_path / "b")
    first.train(range(4))
    first.checkpointer.save(4, training_seconds=1.5)
    second = Run(tmp_path / "b", seed=1)
    assert second.checkpointer.load("latest") == (4, 1.5, {})
    assert_same_state(first.state(), second.state())
    second.train(range(4, 6))
    assert_same_state(uninterrupted.state(), second.state())
    assert second.ema.optimization_step == uninterrupted.ema.optimization_step == 6


def test_new_run_begins_at_zero_and_leaves_the_model_alone(tmp_path):
    run = Run(tmp_path)
    before = run.state()
    assert run.checkpointer.load("latest") == (0, 0.0, {})
    assert_same_state(before, run.state())


def test_models_and_averages_of_a_checkpoint_load_like_any_other(tmp_path):
    run = Run(tmp_path)
    run.train(range(3))
    before = run.state()
    run.checkpointer.save(3, 0.0)
    assert_same_state(before, run.state())

    online = AutoencoderMAE.from_pretrained(tmp_path / "checkpoint-3" / "tokenizer")
    average = AutoencoderMAE.from_pretrained(tmp_path / "checkpoint-3" / "tokenizer_ema")
    for name, value in online.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])
    for value, expected in zip(average.parameters(), run.ema.shadow_params, strict=True):
        assert torch.equal(value, expected)
    assert not torch.equal(average.decoder.proj_out.weight, online.decoder.proj_out.weight)
    assert "optimization_step" not in average.config
    # safetensors only: accelerate would have written the whole objective once more
    assert not list((tmp_path / "checkpoint-3").glob("model*"))


def test_auxiliary_decoders_are_not_saved_with_the_tokenizer(tmp_path):
    run = Run(tmp_path)
    run.checkpointer.save(1, 0.0)
    names = AutoencoderMAE.from_pretrained(tmp_path / "checkpoint-1" / "tokenizer").state_dict()
    assert not any("hog" in name for name in names)


def test_optimiser_state_is_loaded_without_running_pickled_code(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.train(range(1))
    run.checkpointer.save(1, 0.0)
    calls = []
    real_load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (calls.append(k.get("weights_only")), real_load(*a, **k))[1])
    Run(tmp_path).checkpointer.load("latest")
    assert calls
    assert all(calls)


def test_oldest_checkpoints_are_removed_once_the_new_one_is_complete(tmp_path, monkeypatch):
    run = Run(tmp_path, total_limit=2)
    for step in (2, 10):
        run.checkpointer.save(step, 0.0)
    present_at_completion = []
    real = checkpointing._complete
    monkeypatch.setattr(
        checkpointing,
        "_complete",
        lambda *arguments: (present_at_completion.extend(complete_checkpoints(tmp_path)), real(*arguments)),
    )
    run.checkpointer.save(11, 0.0)
    assert [path.name for path in present_at_completion] == ["checkpoint-2", "checkpoint-10"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    assert not (tmp_path / "checkpoint-2").exists()


def fail_with_full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_at(count, function):
    """`function`, which finds the disk full when it is called for the `count`-th time."""
    calls = []

    def wrapped(*arguments, **keywords):
        calls.append(function)
        return fail_with_full_disk() if len(calls) == count else function(*arguments, **keywords)

    return wrapped


PLACES = {
    "weights": (AutoencoderMAE, "save_pretrained", 1),
    "average": (AutoencoderMAE, "save_pretrained", 2),
    "decoders": (checkpointing, "save_file", 1),
    "first optimiser": (torch, "save", 1),
    "second optimiser": (torch, "save", 2),
    "random states": (torch, "save", 3),
    "flushing": (checkpointing, "flush_to_disk", 1),
    "state file": (checkpointing, "write_text", 1),
    "rename": (Path, "rename", 1),
}


@pytest.mark.parametrize("place", PLACES, ids=lambda name: name.replace(" ", "_"))
def test_failed_save_leaves_the_earlier_checkpoint_intact(tmp_path, monkeypatch, place):
    run = Run(tmp_path, total_limit=1)
    run.train(range(1))
    run.checkpointer.save(1, 0.0, extra={"skipped": 1})
    saved = run.state()
    run.train(range(1, 2))
    owner, name, count = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(count, getattr(owner, name)))
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*No space left.*intact"):
            run.checkpointer.save(2, 0.0, extra={"skipped": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = Run(tmp_path, seed=1)
    assert resumed.checkpointer.load("latest") == (1, 0.0, {"skipped": 1})
    assert_same_state(saved, resumed.state())


def test_state_that_is_no_json_is_a_failed_save(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match=r"Tensor is not JSON serializable"):
        run.checkpointer.save(1, 0.0, extra={"counts": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_extra_state_comes_back(tmp_path):
    extra = {"skipped": 3, "counts": [1, 2], "name": "x", "rate": 0.1}
    Run(tmp_path).checkpointer.save(1, 2.5, extra)
    state = Run(tmp_path).checkpointer.load("latest")
    assert (state.step, state.training_seconds, state.extra) == (1, 2.5, extra)


def test_config_values_are_added_to_a_checkpoint_but_not_to_the_models(tmp_path):
    run = Run(tmp_path)
    configs = {"tokenizer": {"latents_std": 2.0}, "tokenizer_ema": {"latents_mean": [0.5, 1.0], "latents_std": 3.0}}
    run.checkpointer.save(1, 0.0)
    run.checkpointer.add_to_configs(1, configs)
    for name, values in configs.items():
        config = AutoencoderMAE.from_pretrained(tmp_path / "checkpoint-1" / name).config
        expected = {"latents_mean": None} | values
        assert {key: config[key] for key in expected} == expected
    assert (run.model.config.latents_mean, run.model.config.latents_std) == (None, None)
    again = Run(tmp_path)
    again.checkpointer.load("latest")
    assert again.model.config.latents_std is None


def test_config_values_of_an_unknown_folder_are_refused(tmp_path):
    message = r"`configs` names \['decoder'\], but the model folders are \['tokenizer', 'tokenizer_ema'\]"
    with pytest.raises(ValueError, match=message):
        Run(tmp_path).checkpointer.add_to_configs(1, {"decoder": {}})


def test_checkpoint_that_is_removed_half_way_is_no_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, total_limit=1)
    run.checkpointer.save(1, 0.0)
    removed = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.shutil, "rmtree", lambda path, **kwargs: removed.append(path))
        run.checkpointer.save(2, 0.0)
    assert [path.name for path in removed] == [".checkpoint-1.partial"]
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    Run(tmp_path).checkpointer.load("latest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_folder_from_which_a_model_came_is_not_in_its_checkpoints(tmp_path):
    run = Run(tmp_path / "run")
    run.model.register_to_config(_name_or_path=str(tmp_path / "secret"))
    run.checkpointer.save(1, 0.0)
    for path in (tmp_path / "run").rglob("*.json"):
        assert "secret" not in path.read_text()


def test_scale_of_low_precision_gradients_comes_back(tmp_path):
    run = Run(tmp_path)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**5)
    run.checkpointer.save(1, 0.0)
    again = Run(tmp_path)
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again.checkpointer.load("latest")
    assert again.accelerator.scaler.get_scale() == 2.0**5


def test_average_that_missed_steps_continues_its_own_count(tmp_path):
    run = Run(tmp_path)
    run.train(range(3))
    run.ema.optimization_step = 0  # the first update copies; a run may save before it
    run.checkpointer.save(3, 0.0)
    again = Run(tmp_path, seed=1)
    again.checkpointer.load("latest")
    assert again.ema.optimization_step == 0


def test_disk_without_room_for_a_checkpoint_is_refused_before_training(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.train(range(1))
    run.checkpointer.save(1, 0.0)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file())
    asked = []

    def disk_usage(free):
        return lambda folder: (asked.append(folder), SimpleNamespace(free=free))[1]

    monkeypatch.setattr(checkpointing.shutil, "disk_usage", disk_usage(size // 10))
    with pytest.raises(ValueError, match=r"GB free and one checkpoint takes .* GB: make room"):
        run.checkpointer.check_disk_space()
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", disk_usage(100 * size))
    run.checkpointer.check_disk_space()
    assert asked == [tmp_path, tmp_path]


def test_half_written_checkpoint_is_never_picked_up_and_is_removed(tmp_path):
    run = Run(tmp_path)
    run.checkpointer.save(3, 0.0)
    # killed during the save: everything but the state file and the rename
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-5.partial")
    # copied by hand and not to the end
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / checkpointing.STATE_FILE).unlink()
    assert Run(tmp_path).checkpointer.load("latest")[0] == 3
    assert not (tmp_path / ".checkpoint-5.partial").exists()
    assert (tmp_path / "checkpoint-7").exists()


def test_saving_the_same_step_again_keeps_the_first(tmp_path):
    run = Run(tmp_path)
    run.checkpointer.save(1, 1.0)
    run.checkpointer.save(1, 2.0)
    assert Run(tmp_path).checkpointer.load("latest") == (1, 1.0, {})


def test_other_settings_are_refused_and_listed(tmp_path):
    Run(tmp_path).checkpointer.save(4, 0.0)
    other = {"recipe": {"learning_rate": 2e-3, "max_train_steps": 10}, "seed": 1, "stage": "new"}
    run = Run(tmp_path, identity=other)
    before = run.state()
    with pytest.raises(ValueError) as caught:
        run.checkpointer.load("latest")
    message = str(caught.value)
    assert "recipe.learning_rate: 0.001 there, 0.002 now" in message
    assert "seed: 0 there, 1 now" in message
    assert "stage: None there, 'new' now" in message
    assert "max_train_steps" not in message
    assert_same_state(before, run.state())


def test_longer_run_may_continue_a_shorter_one(tmp_path):
    Run(tmp_path).checkpointer.save(4, 0.0)
    longer = {"recipe": {"learning_rate": 1e-3, "max_train_steps": 20}, "seed": 0}
    with pytest.warns(UserWarning, match="recipe.max_train_steps is 20 now and was 10"):
        assert Run(tmp_path, identity=longer).checkpointer.load("latest")[0] == 4


def test_accumulation_begins_anew_after_a_resumption(tmp_path):
    run = Run(tmp_path, accumulation=3)
    for _ in range(3):
        with run.accelerator.accumulate(run.prepared):
            pass
    run.checkpointer.save(1, 0.0)
    fresh_accelerate_state = Run(tmp_path, accumulation=2)
    fresh_accelerate_state.checkpointer.load("latest")
    assert fresh_accelerate_state.accelerator.step == 0


def test_average_without_model_is_refused(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ValueError, match=r"`ema` has names that `models` lacks: \['other'\]"):
        Checkpointer(run.accelerator, tmp_path, IDENTITY, models={"tokenizer": run.model}, ema={"other": run.ema})


def write_export(version):
    def write(folder):
        (folder / "config.json").write_text(version)
        (folder / "vae").mkdir()
        (folder / "vae" / "weights").write_text(version)

    return write


def test_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "training_log.jsonl").write_text("log")
    for version in ("first", "second"):
        export(tmp_path, write_export(version))
        assert (tmp_path / "config.json").read_text() == version
        assert (tmp_path / "vae" / "weights").read_text() == version
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "training_log.jsonl", "config.json", "vae"}


def test_failed_export_leaves_the_earlier_one_whole(tmp_path):
    export(tmp_path, write_export("first"))

    def write(folder):
        write_export("second")(folder)
        fail_with_full_disk()

    with pytest.raises(OSError, match="No space left"):
        export(tmp_path, write)
    assert (tmp_path / "config.json").read_text() == "first"
    assert (tmp_path / "vae" / "weights").read_text() == "first"


def source_of(rows, sizes, classes=("cat", "dog"), files=("0.parquet",)):
    return SimpleNamespace(
        num_rows=sum(sizes),
        chunk_shards=np.zeros(len(sizes), dtype=np.int64),
        chunk_sizes=np.array(sizes),
        columns=SimpleNamespace(class_names=classes),
        read_chunk=lambda chunk: rows,
        listing=lambda: ((file,) for file in files),
    )


def test_data_identity_follows_content_not_location():
    rows = [({"bytes": b"pixels", "path": "/here/a.png"}, 0), ({"bytes": None, "path": "/here/b.png"}, 1)]
    moved = [({"bytes": b"pixels", "path": "/there/a.png"}, 0), ({"bytes": None, "path": "/there/b.png"}, 1)]
    identity = data_identity(source_of(rows, [2, 4]))
    assert identity == data_identity(source_of(moved, [2, 4]))
    assert identity == json.loads(json.dumps(identity))
    others = [
        source_of([({"bytes": b"others", "path": "/here/a.png"}, 0), rows[1]], [2, 4]),
        source_of([(rows[0][0], 1), rows[1]], [2, 4]),
        source_of(rows, [4, 2]),
        source_of(rows, [2, 4], classes=("cat", "fox")),
        source_of(rows, [2, 4], files=("1.parquet",)),
    ]
    assert all(data_identity(other) != identity for other in others)


@pytest.mark.parametrize("change", ["moved", "renamed", "rewritten", "relabelled"])
def test_data_identity_covers_every_file_of_a_folder(change, tmp_path):
    """None of the changes is in the first rows or changes a number of rows."""

    def open_folder(name):
        return data_identity(open_images(tmp_path / name, cache_dir=tmp_path / "cache"))

    for index in range(60):
        path = tmp_path / "first" / "train" / f"class-{index // 30}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    identity, folder = open_folder("first"), tmp_path / "second" / "train"
    assert open_folder("second") == identity
    last = folder / "class-0" / "29.png"
    if change == "moved":
        last.unlink()
        (folder / "class-1" / "60.png").write_bytes(b"no image")
    elif change == "renamed":
        last.rename(folder / "class-0" / "299.png")
    elif change == "rewritten":
        last.write_bytes(b"another")
    else:
        last.rename(folder / "class-1" / "29.png")
        (folder / "class-1" / "30.png").rename(folder / "class-0" / "30.png")
    with pytest.raises(ValueError, match="belongs to a run with other settings:\n  data.digest: "):
        check_identity(tmp_path, {"data": identity}, {"data": open_folder("second")})


def test_model_digest_changes_with_a_weight_and_a_config_value(tmp_path):
    model = Run(tmp_path).model
    digest = model_digest(model)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoencoderMAE.from_pretrained(tmp_path / "model")
    assert model_digest(loaded) == digest
    loaded.register_to_config(latents_mean=0.5)
    assert model_digest(loaded) != digest
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert model_digest(model) != digest
