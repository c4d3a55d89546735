"""The comparison of tokenizers: equal budgets, honest statistics, and runs that are kept."""

import argparse
import importlib.util
import json
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.analysis import fit_linear_probe
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_tokenizers.py"

spec = importlib.util.spec_from_file_location("compare_tokenizers", SCRIPT)
compare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)


@pytest.fixture
def args(tmp_path):
    words = ["--seeds", "3", "1", "--max_train_steps", "1500", "--variants", "mask-hog", "autoencoder"]
    return compare.parse_args([*words, "--output_dir", str(tmp_path), "--results_dir", str(tmp_path)])


@pytest.fixture(scope="module")
def splits():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 10
    prototypes = torch.rand(10, 1, 8, 8, generator=generator) * 2 - 1
    images = prototypes[labels] + 0.3 * torch.randn(300, 1, 8, 8, generator=generator)
    images = images.clamp(-1, 1).repeat(1, 3, 1, 1)
    return (images[:200], labels[:200]), (images[200:], labels[200:])


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 1}
    sizes |= {"num_latent_tokens": 4, "latent_channels": 4, "initializer_range": 0.5, "layer_scale_init_value": 0.5}
    return AutoencoderMAE(sample_size=8, latents_mean=0.3, latents_std=2.0, **sizes).eval()


def run_of(variant, seed, **values):
    columns = {name: 0.0 for name, _, _ in compare.COLUMNS}
    return {"variant": variant, "seed": seed, "device": "CPU", "training_seconds": 60.0} | columns | values


@pytest.mark.parametrize("variant", compare.VARIANTS)
@pytest.mark.parametrize("max_train_steps", [None, 1500, 20])
def test_variants_differ_in_masks_and_targets_only(variant, max_train_steps):
    recipe, _ = compare.recipe_of(variant, max_train_steps)
    full, _ = compare.recipe_of("mask-hog", max_train_steps)
    assert recipe.max_train_steps == (max_train_steps or 3500)
    different = {name for name, value in asdict(recipe).items() if value != asdict(full)[name]}
    masks, targets = {"mask_ratio_min", "mask_ratio_max"}, {"auxiliary_targets"}
    auxiliary = {name for name in different if name.startswith("auxiliary_") or name == "hog_weight"}
    assert different - auxiliary <= masks
    assert bool(different & masks) == ("mask" not in variant) == (recipe.mask_ratio_max == 0)
    assert bool(different & targets) == ("hog" not in variant) == (recipe.auxiliary_targets == [])


@pytest.mark.parametrize("variant", compare.VARIANTS)
def test_the_training_script_reads_the_command_as_the_recipe_that_is_recorded(args, variant):
    words = compare.train_command(variant, 7, args, "SCRIPT", "DATA", "RUN")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    folder = compare.EXAMPLES / "recipes"
    parsed, options = parse_arguments(
        parser, TokenizerRecipe, TokenizerRunOptions, folder, words[words.index("SCRIPT") + 1 :]
    )
    assert parsed == compare.recipe_of(variant, 1500)[0]
    assert (options.seed, options.dataset_name, options.output_dir) == (7, "DATA", "RUN")


def test_measurements_are_those_of_unmasked_held_out_images(monkeypatch, tokenizer, splits):
    monkeypatch.setattr(compare, "BATCH_SIZE", 64)
    measured = compare.measure(tokenizer, *splits)
    (train, train_labels), (held_out, labels) = splits
    with torch.no_grad():
        reconstructions = tokenizer(held_out).sample.clamp(-1, 1)
        latents = [tokenizer.encode(images).latent for images in (train, held_out)]
    errors = (reconstructions - held_out).square().flatten(1).mean(1)
    assert measured["psnr_db"] == pytest.approx((10 * torch.log10(4 / errors)).mean().item(), rel=1e-5)
    # the probe standardises, so that the tokenizer's own statistics do not matter
    probe = fit_linear_probe(latents[0], train_labels, 10, l2=compare.PROBE_L2)
    assert measured["probe_accuracy_percent"] == pytest.approx(100 * probe.accuracy(latents[1], labels))
    assert measured["probe_cross_entropy"] == pytest.approx(probe.cross_entropy(latents[1], labels), abs=1e-3)
    weak = fit_linear_probe(latents[0], train_labels, 10, l2=1e-2)
    assert measured["probe_accuracy_percent_l2_0.01"] == pytest.approx(100 * weak.accuracy(latents[1], labels))
    assert set(name for name, _, _ in compare.COLUMNS) <= set(measured)


def test_the_summary_has_means_and_sample_deviations():
    runs = [run_of("mask-hog", seed, psnr_db=value) for seed, value in enumerate([20.0, 21.0, 25.0])]
    summary = compare.summarise([*runs, run_of("autoencoder", 0, psnr_db=18.0)])
    assert list(summary) == ["mask-hog", "autoencoder"]
    assert summary["mask-hog"]["psnr_db"] == {"mean": 22.0, "std": pytest.approx(7**0.5)}
    assert summary["autoencoder"]["psnr_db"] == {"mean": 18.0, "std": None}  # one value has no spread


def test_the_report_shows_every_run_and_no_place(args, tmp_path):
    runs = [
        run_of(variant, seed, psnr_db=20.0 + seed, probe_accuracy_percent=90.0 + seed)
        for variant in args.variants
        for seed in args.seeds
    ]
    report = compare.report_of(args, runs, 88.0)
    report = json.loads(json.dumps(report, allow_nan=False))
    text = compare.to_markdown(report)
    assert "| masks and HOG target | 22.00 ± 1.41 | 92.0 ± 1.4 |" in text
    assert "| plain autoencoder | 3 | 23.00 | 93.0 |" in text and "| plain autoencoder | 1 | 21.00 | 91.0 |" in text
    assert (
        "1500 steps of 32 images" in text
        and "4 minutes for all training" in text
        and "pixels themselves: 88.0 %" in text
    )
    assert "--seeds 3 1 --num_threads 2 --max_train_steps 1500" in text
    assert not any(str(place) in text + json.dumps(report) for place in (tmp_path, compare.ROOT))


def finished(folder, args, seed, **recipe):
    """What the training script leaves behind."""
    folder.mkdir()
    report = {
        "recipe": asdict(compare.recipe_of("autoencoder", args.max_train_steps)[0]) | recipe,
        "options": {"seed": seed},
        "device": "cpu",
        "training_seconds": 60.0,
        "num_parameters": 10,
    }
    (folder / "train_report.json").write_text(json.dumps(report))


def test_finished_runs_are_measured_once_and_kept(monkeypatch, args, tokenizer, splits, tmp_path):
    monkeypatch.setattr(compare.subprocess, "run", None)  # nothing is left to train
    folder = tmp_path / "autoencoder-seed3"
    finished(folder, args, seed=3)
    tokenizer.save_pretrained(folder)
    first = compare.measured_run("autoencoder", 3, args, tmp_path / "data", splits)
    assert first["seed"] == 3 and first["device"] == "CPU"
    assert {"psnr_db", "training_seconds"} <= set(first)
    (folder / "train_report.json").unlink()
    assert compare.measured_run("autoencoder", 3, args, tmp_path / "data", splits) == first
    args.max_train_steps = 1400
    with pytest.raises(SystemExit, match="measured with other settings"):
        compare.measured_run("autoencoder", 3, args, tmp_path / "data", splits)


@pytest.mark.parametrize("change", [{"seed": 2}, {"seed": 1, "learning_rate": 1.0}])
def test_a_run_that_was_trained_otherwise_is_refused(monkeypatch, args, splits, tmp_path, change):
    finished(tmp_path / "autoencoder-seed1", args, **change)
    with pytest.raises(SystemExit, match="trained with other settings"):
        compare.measured_run("autoencoder", 1, args, tmp_path / "data", splits)


def test_a_training_that_fails_ends_the_comparison(monkeypatch, args, splits, tmp_path):
    commands = []

    def run(command):
        commands.append(command)
        return types.SimpleNamespace(returncode=3)

    monkeypatch.setattr(compare.subprocess, "run", run)
    with pytest.raises(SystemExit, match="ended with status 3; give the same command again"):
        compare.measured_run("mask-hog", 1, args, tmp_path / "data", splits)
    words = commands[0]
    for name, value in (("data", tmp_path / "data"), ("output", tmp_path / "mask-hog-seed1")):
        place = next(index for index, word in enumerate(words) if word.startswith(f"--{name}"))
        assert words[place + 1] == str(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1", "1"], "names something twice"),
        (["--variants", "mask", "mask"], "names something twice"),
        (["--max_train_steps", "0"], "must be at least 1, got 0"),
        (["--variants", "vae"], "invalid choice"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        compare.parse_args(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_comparison_runs_and_runs_again(copies, tmp_path):
    command = [sys.executable, SCRIPT, "--max_train_steps", "2", "--seeds", "5", "--num_threads", "1"]
    command += ["--output_dir", str(tmp_path / "runs"), "--results_dir", str(tmp_path / "results")]
    first = copies.run(command)
    assert first.returncode == 0, first.stdout
    report = json.loads((tmp_path / "results" / "compare_tokenizers.json").read_text())
    assert [(run["variant"], run["seed"]) for run in report["runs"]] == [("autoencoder", 5), ("mask-hog", 5)]
    assert all(run["probe_accuracy_percent"] > 50 for run in report["runs"])  # even random features tell digits apart
    again = copies.run(command)
    assert again.returncode == 0, again.stdout
    assert "accelerate" not in again.stdout.partition("# Tokenizers")[0]  # nothing was trained again
    assert json.loads((tmp_path / "results" / "compare_tokenizers.json").read_text())["runs"] == report["runs"]
