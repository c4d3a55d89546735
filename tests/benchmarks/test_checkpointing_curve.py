"""The curve of gradient checkpointing: what is computed, what is measured, and that the committed tables are both."""

import dataclasses
import json

import pytest

from benchmarks import checkpointing_curve
from benchmarks.checkpointing_curve import SHARES, GeneratorStep, curves, draw, operations
from benchmarks.machine import RESULTS
from benchmarks.training_memory import ComputedMemory
from benchmarks.training_step import RECIPES
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe


FEW_SHARES = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "checkpointing_curve.json").read_text())


@pytest.fixture
def small_step(monkeypatch):
    recipe = load_recipe(SiTRecipe, RECIPES / "sit-b-256.yaml")
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    recipe = dataclasses.replace(recipe, model=recipe.model | sizes)
    monkeypatch.setattr(checkpointing_curve, "load_recipe", lambda *arguments: recipe)
    monkeypatch.setattr(checkpointing_curve, "SHARES", FEW_SHARES)
    return GeneratorStep(recipe)


def test_more_shares_take_less_memory_and_repeat_their_blocks(small_step):
    flops = list(operations("sit-b-256").values())
    repeated = [later - earlier for earlier, later in zip(flops[:-1], flops[1:], strict=True)]
    assert len(set(repeated)) == 1 and repeated[0] > 0, "a block each"
    # forward passes of the blocks, which are nearly all of the model
    assert 0.2 < (flops[-1] - flops[0]) / flops[0] < 1 / 3
    memory, peaks = ComputedMemory(small_step), []
    for share in FEW_SHARES:
        enable_gradient_checkpointing(small_step.objective, share)
        peaks.append(memory.peak(64))
    assert peaks[2] < peaks[1] < 0.8 * peaks[0]


def test_what_is_measured_is_a_step_of_each_share(small_step):
    found = checkpointing_curve.measure("sit-b-256", 2, "cpu", 2)
    assert [row["share"] for row in found["rows"]] == list(FEW_SHARES)
    assert all(row["seconds"] > 0 and row["peak_bytes"] is None for row in found["rows"])
    assert found["rows"][0]["times_none"] == 1
    assert (found["batch_size"], found["num_rounds"]) == (2, 2)


def test_the_committed_tables_are_those_of_the_committed_numbers(committed):
    text = (RESULTS / "checkpointing_curve.md").read_text()
    assert text == checkpointing_curve.to_markdown(committed) + "\n"
    assert ("Not measured." in text) == (not committed["measured"])


@pytest.mark.slow
def test_the_committed_operations_are_those_of_the_recipe(committed):
    rows = committed["computed"]["SiT-B, 128 x 32"]
    assert {row["share"]: row["flops_per_image"] for row in rows} == operations("sit-b-256")


def test_the_committed_curves_fall_from_none_to_all(committed):
    assert committed["computed"].keys() == checkpointing_curve.CASES.keys()
    for points in curves(committed).values():
        shares, memory, flops, _ = zip(*points, strict=True)
        assert shares == SHARES
        assert memory[0] == flops[0] == 1
        assert list(memory) == sorted(memory, reverse=True) and list(flops) == sorted(flops)
        assert 1 < flops[-1] < 4 / 3


def test_the_picture_and_the_tables_have_times_where_some_are_measured(committed):
    rows = [
        {"share": share, "seconds": 2 + share, "times_none": 1 + share / 2, "peak_bytes": None} for share in SHARES
    ]
    own = {"batch_size": 8, "device": "cpu", "num_rounds": 9, "rows": rows}
    report = committed | {"measured": {"SiT-B, 128 x 32": own}}
    axes = draw(report).axes[0]
    assert len(axes.lines) == len(report["computed"]) + 1
    assert list(axes.lines[2].get_ydata()) == [1 + share / 2 for share in SHARES]
    assert len(draw(committed | {"measured": {}}).axes[0].lines) == len(report["computed"])
    assert "| SiT-B, 128 x 32, batch 8, cpu | 0.5 | 2.500 | 1.25 |" in checkpointing_curve.to_markdown(report)
