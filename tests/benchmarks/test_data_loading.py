"""The loader's benchmark: what it compares are the same pixels, and its numbers mean what they say."""

import io
import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import data_loading

    return data_loading


def test_files_are_different_photographs_of_500_x_375(benchmark):
    jpegs = benchmark.make_jpegs(6, 95)
    assert len(set(jpegs)) == 6
    for jpeg in jpegs:
        image = PIL.Image.open(io.BytesIO(jpeg))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
        assert 30_000 < len(jpeg) < 200_000


def test_both_bare_rates_make_the_same_tensor(benchmark):
    for jpeg in benchmark.make_jpegs(4, 95):
        expected = benchmark.plain(jpeg, 256)
        assert expected.shape == (3, 256, 256) and expected.dtype == torch.uint8 and expected.is_contiguous()
        assert torch.equal(benchmark.transform(jpeg, 256), expected)


def test_ratios_set_the_loader_against_each_bare_rate_of_the_same_round(benchmark):
    rounds = iter(range(1, 100))
    measures = {
        "plain": lambda count: (100.0, 0.002),
        "loader": lambda count: (10.0 * (1 + next(rounds)), 0.004),
    }
    result = benchmark.compare(measures, 8, 3)
    assert result["loader"]["images_per_second"]["median"] == 40, "the first round warms up"
    ratios = result["loader_to_plain"]
    assert (ratios["by_the_clock"]["min"], ratios["by_the_clock"]["max"]) == (0.3, 0.5)
    assert ratios["by_processor_time"]["median"] == 0.5


def test_every_measure_is_first_in_some_round(benchmark):
    order = []
    measures = {name: lambda count, name=name: (order.append(name), (1.0, 1.0))[1] for name in "abc"}
    benchmark.compare(measures, 8, 3)
    assert {order[start] for start in range(3, len(order), 3)} == {"a", "b", "c"}


@pytest.mark.slow
def test_the_command_writes_its_result(tmp_path):
    words = "--num_files 16 --num_images 16 --num_rounds 2 --batch_size 4 --block_size 8 --num_workers 2".split()
    command = [sys.executable, "-m", "benchmarks.data_loading", "--output", str(tmp_path / "result.json"), *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    result = json.loads((tmp_path / "result.json").read_text())
    for source in ("parquet", "in_memory"):
        assert result[source]["loader_to_plain"]["by_the_clock"]["median"] > 0
    assert "| parquet | transform |" in (tmp_path / "result.md").read_text()
