"""Tiny data and recipes for the training scripts, and ways to run, interrupt and compare them."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from tests.networks import save_networks


EXAMPLES = Path(__file__).parents[2] / "examples"
FAULTY_LAUNCH = Path(__file__).parent / "faulty_launch.py"

TOKENIZER_RECIPE = """
resolution: 16
model:
  patch_size: 4
  hidden_size: 16
  num_layers: 2
  num_attention_heads: 1
  num_latent_tokens: 4
  latent_channels: 2
  decoder_drop_path_rate: 0.3
  layer_scale_init_value: 0.5
perceptual_weight: 0
adversarial_weight: 0
auxiliary_targets: [hog]
auxiliary_num_layers: 1
auxiliary_hidden_size: 16
auxiliary_num_attention_heads: 1
total_batch_size: 8
max_train_steps: 8
learning_rate: 1.0e-2
scale_learning_rate: false
lr_warmup_steps: 2
ema_decay: 0.8
latent_statistics_images: 24
"""
FULL_RECIPE = """
resolution: 32
model:
  patch_size: 8
  hidden_size: 16
  num_layers: 2
  num_attention_heads: 1
  num_latent_tokens: 4
  latent_channels: 2
  modulated_decoder: true
  decoder_drop_path_rate: 0.3
perceptual_warmup_steps: 4
adversarial_start_step: 3
adversarial_warmup_steps: 2
discriminator_image_size: 32
discriminator_learning_rate: 1.0e-2
lecam_decay: 0.5
auxiliary_targets: [hog, dinov2, siglip, text]
auxiliary_num_layers: 1
auxiliary_hidden_size: 16
auxiliary_num_attention_heads: 1
text_length: 6
total_batch_size: 8
max_train_steps: 8
learning_rate: 1.0e-2
scale_learning_rate: false
lr_warmup_steps: 2
ema_decay: 0.8
latent_statistics_images: 24
"""
DECODER_RECIPE = """
stage: decoder_finetuning
resolution: 16
perceptual_weight: 0
adversarial_weight: 0
mask_ratio_decay_steps: 4
total_batch_size: 8
max_train_steps: 8
learning_rate: 1.0e-2
scale_learning_rate: false
lr_warmup_steps: 2
ema_decay: 0.8
"""
SIT_RECIPE = """
resolution: 16
model:
  num_layers: 1
  num_attention_heads: 2
  attention_head_dim: 8
total_batch_size: 8
max_train_steps: 8
learning_rate: 1.0e-2
ema_decay: 0.8
"""


def _png(index: int) -> bytes:
    """A square whose place and colour depend on `index`; a shade per class cannot be learned in 8 steps."""
    rng = np.random.default_rng(index)
    pixels = np.full((20, 24, 3), 32, dtype=np.uint8)
    top, left = rng.integers(0, 12, 2)
    pixels[top : top + 8, left : left + 8] = rng.integers(64, 256, 3)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Parquet shards: `train` has 41 rows of 3 classes, one of them corrupt, `test` has 6. Not all have a caption."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    folder = tmp_path_factory.mktemp("data")
    classes = ClassLabel(names=["one", "two", "three"])
    features = Features({"image": Image(), "label": classes, "caption": Value("string")})
    for split, shards in (("train", [range(0, 16), range(16, 41)]), ("test", [range(100, 106)])):
        for number, rows in enumerate(shards):
            images = [{"bytes": b"broken" if row == 7 else _png(row), "path": None} for row in rows]
            columns = {"image": images, "label": [row % 3 for row in rows]}
            columns["caption"] = [None if row % 5 == 0 else f"a square, number {row}" for row in rows]
            table = Dataset.from_dict(columns, features=features)
            table.to_parquet(folder / f"{split}-{number}.parquet")
    return folder


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory):
    """A folder of 20 JPEGs of 2 classes: 16 of them are grayscale, 4 are CMYK."""
    folder = tmp_path_factory.mktemp("odd")
    for index in range(20):
        path = folder / "train" / ("one", "two")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.open(io.BytesIO(_png(index))).convert("CMYK" if index < 4 else "L").save(path)
    return folder


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """Paths of the tiny recipes by name."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = {"tokenizer": TOKENIZER_RECIPE, "decoder": DECODER_RECIPE, "sit": SIT_RECIPE}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in texts}


@pytest.fixture(scope="session")
def full_recipe(tmp_path_factory):
    """Path of a tiny recipe with every loss, and the folder of its networks, which `TORCH_HOME` must name."""
    folder = tmp_path_factory.mktemp("networks")
    settings = "".join(f"{name}: {value}\n" for name, value in save_networks(folder).items())
    (folder / "full.yaml").write_text(FULL_RECIPE + settings)
    return folder / "full.yaml"


@pytest.fixture
def full_flags(full_recipe, base_flags, monkeypatch):
    """Flags of a run with every loss."""
    monkeypatch.setenv("TORCH_HOME", str(full_recipe.parent))
    return ["--recipe", full_recipe, *base_flags, "--checkpointing_steps", "2", "--caption_column", "caption"]


@pytest.fixture
def base_flags(data_folder, tmp_path):
    """Flags that every run needs but `--recipe` and `--output_dir`."""
    return ["--dataset_name", str(data_folder), "--cache_dir", str(tmp_path / "cache"), "--logging_steps", "1"]


def load_script(name: str):
    """The module of a training script, freshly executed."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_here(monkeypatch):
    """Run a script's `main` in this process: `run_here(script, *flags, prepare=...)` with a hook on its module."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()

    def run(name, *flags, prepare=lambda module: None):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        module = load_script(name)
        prepare(module)
        with monkeypatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            patch.setattr(sys, "argv", [name, *map(str, flags)])
            module.main()

    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def launch_command(name: str, *flags, processes: int = 1, fault: str | None = None) -> list[str]:
    """The `accelerate launch` command line of a script on the CPU, with one thread per process."""
    script = [str(EXAMPLES / f"{name}.py")]
    if fault is not None:
        script = [str(FAULTY_LAUNCH), fault, *script]
    place = ["--cpu"] if processes == 1 else ["--multi_gpu", "--main_process_port", "0"]
    settings = ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    settings += ["--num_cpu_threads_per_process", 1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *place, *settings, *script, *flags]
    return [str(word) for word in command]


def launch_environment() -> dict[str, str]:
    # `--multi_gpu` is accelerate's only local launcher of several processes; this makes it take the CPU and gloo
    return os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def launch(copies):
    """
    Run a script by `accelerate launch`: `launch(script, *flags, processes=1, fault=None)`, the output and code. Its
    processes are copies of one that has imported everything, or with `anew=True` those that a user has.
    """

    def run(name, *flags, anew=False, **settings):
        command = launch_command(name, *flags, **settings)
        if not anew:
            return copies.run(command, env=launch_environment())
        return subprocess.run(
            command,
            env=launch_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def result_of():
    """Everything a run leaves that must not depend on interruptions: weights, optimiser, log without times."""

    def read(folder):
        folder = Path(folder)
        state = {}
        checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state["checkpoint"] = checkpoint.name
        for path in [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]:
            state |= {f"export/{path.name}/{name}": value for name, value in load_file(path).items()}
        for path in checkpoint.rglob("*.safetensors"):
            prefix = path.relative_to(checkpoint)
            state |= {f"{prefix}/{name}": value for name, value in load_file(path).items()}
        for path in checkpoint.glob("optimizer*.bin"):
            optimizer = torch.load(path, weights_only=True)
            for number, moments in optimizer["state"].items():
                state |= {f"{path.name}/{number}/{name}": value for name, value in moments.items()}
        state["extra"] = json.loads((checkpoint / "trainer_state.json").read_text()).get("extra")
        for path in checkpoint.glob("*/config.json"):
            state[str(path.relative_to(checkpoint))] = json.loads(path.read_text()).get("latents_std")
        log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        state["log"] = [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]
        return state

    return read


@pytest.fixture
def assert_same_result(result_of):
    """Compare two runs' folders bit for bit."""

    def compare(one, other):
        one, other = result_of(one), result_of(other)
        assert one.keys() == other.keys()
        assert sum(isinstance(value, torch.Tensor) for value in one.values()) > 20
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name

    return compare


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer with random weights and made-up statistics."""
    from maetok_hf import AutoencoderMAE

    folder = tmp_path_factory.mktemp("tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = AutoencoderMAE(
            sample_size=16,
            patch_size=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=1,
            num_latent_tokens=4,
            latent_channels=2,
            layer_scale_init_value=0.5,
            latents_mean=0.1,
            latents_std=0.4,
        )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents_folder(tokenizer_folder, data_folder, tmp_path_factory):
    """The latents of both views of the images."""
    folder = tmp_path_factory.mktemp("latents")
    cache_latents(folder / "latents", tokenizer_folder, data_folder)
    return folder / "latents"


def cache_latents(folder, tokenizer, data, *more):
    flags = ["--tokenizer_name_or_path", tokenizer, "--dataset_name", data, "--resolution", "16", *more]
    flags += ["--output_dir", folder, "--cache_dir", folder.parent / "cache"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["cache_latents", *map(str, flags)])
        load_script("cache_latents").main()


@pytest.fixture
def flags_of(recipes, base_flags, tokenizer_folder, latents_folder):
    """Flags of a generator's run on cached latents or on images: `flags_of(mode)`."""

    def flags(mode):
        data = base_flags if mode == "online" else ["--latents_name_or_path", latents_folder, "--logging_steps", "1"]
        tokenizer = ["--tokenizer_name_or_path", tokenizer_folder]
        return ["--recipe", recipes["sit"], *data, *tokenizer, "--checkpointing_steps", "2"]

    return flags
