"""The command and the example."""

import json
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from maetok_hf.commands import analyze_latents
from tests.testing_utils import tiny_autoencoder


EXAMPLE = Path(__file__).parents[2] / "examples" / "analyze_latents.py"


@pytest.fixture
def words(tmp_path):
    """A command line that analyses one tokenizer."""
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for number in range(20):
            rng = np.random.default_rng([label, number])
            pixels = rng.integers(100 * label, 100 * label + 150, (16, 16, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    tiny_autoencoder(sample_size=16).save_pretrained(tmp_path / "tokenizer")
    words = ["--tokenizer", tmp_path / "tokenizer", "--dataset", tmp_path / "images", "--resolution", 16]
    words += ["--parts", "probe", "statistics", "mixtures", "--mixture_sizes", 2, 3, "--mixture_seeds", 0]
    words += ["--device", "cpu", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    return [str(word) for word in words]


def test_command_prints_the_table_that_it_writes(words, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    analyze_latents.main(words)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert report["tokenizers"]["tokenizer"]["latents"]["num_images"] == {"train": 36, "held_out": 4}
    table = (tmp_path / "out" / "analysis.md").read_text().split("How it was measured")[0]
    assert table in printed and "linear probe, top 1 (%)" in table
    assert signal.getsignal(signal.SIGTERM) is handler


def test_example_is_the_command(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "out" / "analysis.json").is_file()


def test_several_processes_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process, and there are 2.*cache_latents.py"):
        analyze_latents.main(words)
    assert not (tmp_path / "out").exists()


def test_wrong_options_end_the_command_with_their_message(capsys):
    with pytest.raises(SystemExit):
        analyze_latents.main(["--tokenizer", "a/b", "--output_dir", "x", "--mixture_sizes", "0"])
    assert "`mixture_sizes` must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        analyze_latents.main(["--output_dir", "x"])
    assert "tokenizer" in capsys.readouterr().err
