"""What the generators' script itself costs on cached latents: every part of a step is in one place."""

import dataclasses
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks import generator_overhead
from benchmarks.generator_overhead import make_cache, run_case, to_markdown
from benchmarks.machine import machine
from benchmarks.training_overhead import NETWORK, OWN, Case, Times, shares, summarise
from benchmarks.training_step import RECIPES
from maetok_hf.data import open_latents
from maetok_hf.data.latents import StreamingLatents
from maetok_hf.training.latent_encoding import check_same_encoder, load_tokenizer
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe


TINY_MODEL = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
CASE = Case(
    "tiny", "demo-sit", {"model": TINY_MODEL, "total_batch_size": 4}, {"mixed_precision": "no"}, warmup=1, steps=3
)


@pytest.fixture
def clean_process(monkeypatch):
    """What a training leaves behind in its process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo-sit")
    make_cache(folder, load_recipe(SiTRecipe, RECIPES / "demo-sit.yaml"), (3, 2), num_classes=5, num_rows=70)
    return folder


def test_the_latents_are_those_of_the_tokenizer_standard_normal_and_of_every_class(demo_cache):
    source = open_latents(demo_cache / "latents")
    assert (source.num_rows, source.latent_shape, source.num_views, source.num_classes) == (70, (3, 2), 1, 5)
    assert source.metadata["dtype"] == "float16" and source.metadata["resolution"] == 32
    check_same_encoder(load_tokenizer(str(demo_cache / "tokenizer")), source.metadata)
    batch = next(iter(StreamingLatents(source, batch_size=70, seed=0, random_flip=False).dataloader()))
    assert batch["latents"].mean().abs() < 1e-3 and abs(batch["latents"].std() - 1) < 3e-3, "normalised by their own"
    assert abs(source.statistics["scalar"]["latents_std"] - 1) < 0.2
    assert batch["indices"].sort().values.tolist() == list(range(70))
    assert batch["class_labels"].equal(batch["indices"] % 5)


def test_a_recipe_with_flips_gets_latents_of_both_views(tmp_path):
    make_cache(tmp_path, load_recipe(SiTRecipe, RECIPES / "sit-b-256.yaml"), (2, 2), num_classes=3, num_rows=4)
    source = open_latents(tmp_path / "latents")
    assert source.num_views == 2 and source.metadata["resolution"] == 256


def test_a_slow_loader_is_found_in_its_place(demo_cache, monkeypatch, clean_process):
    normalize = StreamingLatents.normalize
    monkeypatch.setattr(StreamingLatents, "normalize", lambda *args: time.sleep(0.05) or normalize(*args))
    run = run_case(CASE, str(demo_cache), num_threads=1)
    assert len(run["seconds"]) == 3 and run["batch_size"] == 4
    for step in run["seconds"]:
        assert step.keys() == {"step", *NETWORK, *OWN} - {"the rest"}
        assert step["loading"].wall > 0.05
        assert all(times.wall > 0 for times in step.values())
        parts = shares(step, "wall")
        assert parts["the rest"] > 0 and parts["own"] > 0.05


def test_a_report_judges_each_case_by_its_processor_time_and_names_the_command():
    def case(name, own):
        step = {part: Times(1.0, (100 - own) / 3) for part in NETWORK} | {"loading": Times(97.0, own)}
        run = {"seconds": [step | {"step": Times(100.0, 100.0)}] * 2, "averaged_bytes": 1, "clipped_bytes": 1}
        return summarise(dataclasses.replace(CASE, name=name), [run | {"batch_size": 4}])

    report = {"cases": [case("cheap", 4.5), case("costly", 5.5)], "limit_percent": 5.0, "num_threads": 1}
    report |= {"load_average": [0.0, 0.0], "machine": machine(), "command": generator_overhead.COMMAND}
    lines = to_markdown(report).split("\n")
    assert "| cheap | 97.0 (97.0 to 97.0) | 4.5 (4.5 to 4.5) | yes |" in lines
    assert "| costly | 97.0 (97.0 to 97.0) | 5.5 (5.5 to 5.5) | no |" in lines
    assert lines[-2] == "python -m benchmarks.generator_overhead"
    description = generator_overhead.__doc__
    measured = "\n".join(lines[lines.index("## How it was measured") : -3])
    assert description[description.index("The script's own") : description.index("    python -m")] in measured
    assert "writes `" not in measured
