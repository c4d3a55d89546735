"""The study of generators: its rows, what is counted and kept, and when it fails."""

import argparse
import json
import sys
import types

import numpy as np
import pytest
import torch

from benchmarks import study_generators as study
from benchmarks.study_generators import MODELS, ROWS, Row
from maetok_hf.pipelines.guidance import resolve_guidance
from maetok_hf.training.generator_parts import make_transformer
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run_options import SiTRunOptions
from maetok_hf.training.sit_recipe import SiTRecipe
from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import tiny_transformer


VAE = {"latents_mean": 0.1, "latents_std": 2.0}
CFG, NONE = {"guidance_method": "cfg"}, {"guidance_method": "cfg", "guidance_scale": 1.0}
AUTOGUIDANCE = {"guidance_method": "autoguidance"}
GFT = {"guidance_method": "gft", "guidance_scale": None, "guidance_temperature": 1 / 1.5}


def folder_flags(folder):
    """Flags that keep everything in a folder."""
    return [word for name in ("output", "demo", "results") for word in (f"--{name}_dir", str(folder / name))]


@pytest.fixture
def args(tmp_path):
    folders = [
        "--output_dir",
        tmp_path / "out",
        "--demo_dir",
        tmp_path / "demo",
        "--results_dir",
        tmp_path / "results",
    ]
    return study.parse_args([*map(str, folders), "--samples_per_class", "2"])


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(study.demo, "NUM_INFERENCE_STEPS", 4)
    monkeypatch.setattr(study.demo, "SAMPLING_BATCH_SIZE", 8)


def guided_pipeline(arguments):
    return tiny_pipeline(
        "sde",
        vae=VAE,
        transformer={"temperature_embedding": arguments["guidance_method"] == "gft"},
        guidance_transformer={} if arguments["guidance_method"] == "autoguidance" else None,
    )


def test_each_architecture_has_every_guidance_and_the_fine_tuned_one_two_temperatures():
    found = {name: [row.guidance for row in ROWS if row.model == name] for name in MODELS}
    gft = found.pop("sit-gft")
    assert gft == ["temperature-1", "temperature-low"]
    assert found.keys() == {"sit", "lightningdit", "usit"}
    assert all(guidance == ["none", "cfg", "autoguidance"] for guidance in found.values())
    assert len({row.name for row in ROWS}) == len({(row.model, row.title) for row in ROWS}) == 11


def test_guided_architectures_and_the_low_temperature_must_pass():
    required = {row.name for row in ROWS if row.must_pass}
    assert required == {"sit-cfg", "lightningdit-cfg", "usit-cfg", "sit-gft-temperature-low"}


def test_rows_ask_the_pipeline_for_the_guidance_of_the_demonstration():
    expected = {"none": ("cfg", 1.0), "cfg": ("cfg", 1.5), "autoguidance": ("autoguidance", 1.5)}
    expected |= {"temperature-1": ("gft", 1.0), "temperature-low": ("gft", 1.5)}
    for row in ROWS:
        asked = {"guidance_scale": study.demo.GUIDANCE_SCALE} | row.arguments
        transformer = tiny_transformer(temperature_embedding=row.is_guidance_free)
        weak = tiny_transformer(1) if row.needs_weak_model else None
        method, scale = resolve_guidance(
            *(asked[name] for name in ("guidance_method", "guidance_scale")),
            asked.get("guidance_temperature"),
            transformer,
            weak,
        )
        assert (method, scale) == (expected[row.guidance][0], pytest.approx(expected[row.guidance][1]))


@pytest.mark.parametrize("max_train_steps", [None, 9, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_training_script_takes_the_flags_and_keeps_the_checkpoint_of_the_weak_model(args, name, max_train_steps):
    model = MODELS[name]
    flags = ["--recipe", model.recipe, "--output_dir", "RUN"]
    flags += study.train_flags(model, args.demo_dir, args.output_dir, max_train_steps)
    if max_train_steps is not None:
        flags += ["--max_train_steps", str(max_train_steps), "--lr_warmup_steps", "0"]
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    recipe, options = parse_arguments(
        parser, SiTRecipe, SiTRunOptions, study.ROOT / "examples" / "recipes", list(map(str, flags))
    )
    assert recipe == study.recipe_of(model, max_train_steps)
    assert recipe.finetuning == recipe.guidance_free == (model.base is not None)
    weak = study.weak_step(model, max_train_steps)
    assert 0.1 * recipe.max_train_steps <= weak <= 0.5 * recipe.max_train_steps
    assert weak == options.checkpointing_steps
    # those of stopped runs come on top of the regular ones
    assert options.checkpoints_total_limit >= recipe.max_train_steps / weak + 10


@pytest.mark.parametrize(
    ("arguments", "interval", "passes"),
    [
        (NONE, (0.0, 1.0), 1.0),
        (CFG, (0.0, 1.0), 2.0),
        (AUTOGUIDANCE, (0.0, 1.0), 2.0),
        (GFT, (0.0, 1.0), 1.0),
        (CFG, (0.9, 1.0), 1.25),  # one of the 4 steps
        (AUTOGUIDANCE, (0.9, 1.0), 1.25),
        (GFT, (0.9, 1.0), 1.0),
    ],
)
def test_passes_of_all_networks_are_counted(monkeypatch, few_steps, arguments, interval, passes):
    monkeypatch.setattr(study.demo, "GUIDANCE_INTERVAL", interval)
    pipe = guided_pipeline(arguments)
    images, labels, found = study.sample(pipe, arguments, num_images=10)
    assert found["passes_per_step"] == passes
    assert found["sampling_seconds"] > 0
    assert images.dtype == np.uint8 and len(images) == 10 and labels.tolist() == list(range(10))
    assert not pipe.transformer._forward_hooks


def test_a_batch_that_is_doubled_counts_as_two_passes(few_steps):
    pipe = guided_pipeline(NONE)
    evaluate = pipe._evaluate

    def evaluate_twice(model, context, latents, time, labels, temperature=1.0):
        twice = evaluate(model, context, latents.repeat(2, 1, 1), time, labels.repeat(2), temperature)
        return twice[: len(latents)]

    pipe._evaluate = evaluate_twice
    assert study.sample(pipe, NONE, num_images=10)[2]["passes_per_step"] == 2.0


def test_classifier_free_guidance_gives_the_demonstration_s_own_samples(few_steps):
    pipe = guided_pipeline(CFG)
    expected, _ = study.demo.generate(pipe, 10, 10)
    assert np.array_equal(study.sample(pipe, CFG, 10)[0], expected)
    assert not np.array_equal(study.sample(pipe, NONE, 10)[0], expected)


class Likeness:
    """Stands in for the real digits: counts what it is asked to measure."""

    def __init__(self):
        self.measured = 0

    def measure(self, images, labels):
        self.measured += 1
        return {"recognition": 0.98, "diversity": 0.95}


@pytest.fixture
def trained(args, few_steps):
    """A trained folder of the study, with the checkpoint of the weak model."""
    folder = args.output_dir / "sit"
    guided_pipeline(CFG).save_pretrained(folder)
    checkpoint = folder / f"checkpoint-{study.weak_step(MODELS['sit'], args.max_train_steps)}"
    tiny_transformer(1, num_layers=1).save_pretrained(checkpoint / "transformer_ema")
    return folder


def rows_of(guidance):
    return next(row for row in ROWS if row.model == "sit" and row.guidance == guidance)


def test_a_measured_row_is_kept_until_its_settings_or_models_change(args, trained):
    digits, row = Likeness(), rows_of("autoguidance")
    first = study.measured_row(row, args, digits)
    assert first["passes"] and first["recognition"] == 0.98 and 1 < first["passes_per_step"] <= 2
    with np.load(args.output_dir / "samples" / "sit-autoguidance.npz") as samples:
        assert samples["arr_0"].shape[0] == 20 and samples["arr_1"].tolist() == 2 * list(range(10))
    assert study.measured_row(row, args, digits) == first and digits.measured == 1
    args.samples_per_class = 3
    study.measured_row(row, args, digits)
    assert digits.measured == 2
    weak = next(trained.glob("checkpoint-*")) / "transformer_ema"
    tiny_transformer(2, num_layers=1).save_pretrained(weak)
    study.measured_row(row, args, digits)
    assert digits.measured == 3


def test_only_autoguidance_needs_the_earlier_checkpoint(args, trained):
    checkpoint = next(trained.glob("checkpoint-*"))
    checkpoint.rename(trained / "gone")
    assert study.load_pipeline(rows_of("cfg"), args).guidance_transformer is None
    with pytest.raises(SystemExit, match=f"{checkpoint.name}, the weak model of autoguidance, is missing: remove"):
        study.load_pipeline(rows_of("autoguidance"), args)


def test_a_fine_tuned_model_whose_base_was_trained_again_is_refused(args, trained, tmp_path):
    model = MODELS["sit-gft"]
    shape = tuple(tiny_transformer().config[name] for name in ("sample_size", "in_channels"))
    given = make_transformer(study.recipe_of(model, None), shape, 10, study.SEED, str(trained))
    report = {"given_transformer": study.model_digest(given, exclude="temperature_embed")}
    study.check_base(model, tmp_path / "tuned", report, args)
    tiny_transformer(3).save_pretrained(trained / "transformer")
    with pytest.raises(SystemExit, match="tuned was fine-tuned from another model than the one in"):
        study.check_base(model, tmp_path / "tuned", report, args)


def measured(recognition=0.97, diversity=0.9, passes=1.0):
    return {"recognition": recognition, "diversity": diversity, "passes_per_step": passes, "sampling_seconds": 30.0}


@pytest.mark.parametrize(
    ("values", "one_pass", "passes"),
    [
        (measured(), False, True),
        (measured(recognition=0.9699), False, False),
        (measured(diversity=0.8999), False, False),
        (measured(diversity=float("nan")), False, False),
        (measured(passes=1.7), False, True),
        (measured(passes=1.7), True, False),
        (measured(), True, True),
    ],
)
def test_bars_are_reached_from_the_bar_on_and_by_gft_in_one_pass(values, one_pass, passes):
    assert study.passes_bars(values, one_pass) is passes


def found_rows(**recognition):
    """All rows as they come out of the study, some with another recognition than 0.98."""
    rows = []
    for row in ROWS:
        values = measured(recognition.get(row.name.replace("-", "_"), 0.98), 0.95)
        facts = {"model": row.model, "guidance": row.guidance, "title": row.title, "must_pass": row.must_pass}
        rows.append(facts | values | {"passes": study.passes_bars(values, row.is_guidance_free)})
    return rows


def facts_of(name, steps=3500):
    model = MODELS[name]
    facts = {"title": model.title, "recipe": model.recipe, "base": model.base, "num_parameters": 4_321_000}
    return facts | {"num_steps": steps, "training_seconds": 350.0, "weak_step": None if model.base else steps // 4}


def test_only_required_rows_can_fail_the_study():
    assert study.missed_rows(found_rows(sit_none=0.5, usit_autoguidance=0.5, sit_gft_temperature_1=0.5)) == []
    missed = study.missed_rows(found_rows(usit_cfg=0.5, sit_gft_temperature_low=0.5))
    assert missed == ["sit-gft (trained, temperature 0.667)", "usit (classifier-free, scale 1.5)"]


def test_the_report_shows_every_row_and_no_place(args, tmp_path):
    models = {name: facts_of(name) for name in MODELS}
    report = study.report_of(args, 200.0, models, found_rows(lightningdit_cfg=0.95), 0.956)
    report = json.loads(json.dumps(report, allow_nan=False))
    assert report["total_seconds"] == 200 + 4 * 350 + 11 * 30
    text = study.to_markdown(report)
    assert "| SiT | none | 1.00 | 30.0 | 0.980 | 0.950 | yes |" in text
    assert "| SiT, GFT | trained, temperature 0.667 | 1.00 | 30.0 | 0.980 | 0.950 | yes, must |" in text
    assert "| LightningDiT | classifier-free, scale 1.5 | 1.00 | 30.0 | 0.950 | 0.950 | no, must |" in text
    assert "| USiT | autoguidance, scale 1.5 |" in text and "| USiT | `demo-usit` | 4.32 | 3500 | 350 | 100 |" in text
    assert "Missed by lightningdit (classifier-free, scale 1.5)." in text
    assert "USiT after 875 steps" in text and "32 minutes on 2 threads" in text
    assert "--recipe demo-sit-gft" in text and "--pretrained_model_name_or_path outputs/study-generators/sit" in text
    assert not any(str(place) in text + json.dumps(report) for place in (tmp_path, study.ROOT))


def test_real_digits_against_their_own_reconstructions(monkeypatch, args):
    labels = np.arange(40) % 10
    real = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    monkeypatch.setattr(study.demo, "load_split", lambda settings, split: (real, labels))
    digits = study.Digits(args, guided_pipeline(NONE))
    assert digits.recognition(real, labels) == 1.0 and digits.recognition(real, (labels + 1) % 10) == 0.0
    reconstructions, _ = study.demo.reconstruct(guided_pipeline(NONE), real)
    assert digits.measure(reconstructions, labels)["diversity"] == pytest.approx(1.0)
    half = digits.measure(reconstructions // 2, labels)["diversity"]
    assert half == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples_per_class", "1"], "`--samples_per_class` must be at least 2, got 1"),
        (["--num_threads", "0"], "`--num_threads` must be at least 1, got 0"),
        (["--max_train_steps", "0"], "`--max_train_steps` must be at least 1, got 0"),
        (["--max_train_steps", "4"], "needs another `--results_dir`"),
    ],
)
def test_what_cannot_be_studied_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        study.parse_args(words)
    assert message in capsys.readouterr().err


def run_main(monkeypatch, args, rows, max_train_steps=None):
    """The study with stand-ins for training and sampling; its calls in order."""
    calls = []
    found = {row["model"] + "-" + row["guidance"]: row for row in rows}
    digits = types.SimpleNamespace(recognition=lambda *split: 0.956, test=())

    def record(name, value):
        return lambda *arguments: calls.append((name, *map(str, arguments[:1]))) or value

    def measure(row: Row, *rest):
        calls.append(("measure", row.name))
        return found[row.name]

    def train(name, *rest):
        calls.append(("train", name))
        return facts_of(name)

    args.max_train_steps = max_train_steps
    monkeypatch.setattr(study, "parse_args", lambda: args)
    monkeypatch.setattr(study, "train_tokenizer", lambda args: calls.append(("tokenizer",)) or 200.0)
    monkeypatch.setattr(study.demo, "launch", record("launch", None))
    monkeypatch.setattr(study, "train_generator", train)
    monkeypatch.setattr(study, "load_pipeline", lambda *arguments: None)
    monkeypatch.setattr(study, "Digits", lambda *arguments: digits)
    monkeypatch.setattr(study, "measured_row", measure)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        study.main()
    finally:
        calls.append(("results", *sorted(path.name for path in args.results_dir.glob("*"))))
    return calls


def test_each_model_is_measured_as_soon_as_it_is_trained(monkeypatch, args):
    calls = run_main(monkeypatch, args, found_rows())
    assert calls[:3] == [("tokenizer",), ("launch", "cache_latents.py"), ("train", "sit")]
    assert calls[3:7] == [("measure", f"sit-{name}") for name in ("none", "cfg", "autoguidance")] + [
        ("train", "sit-gft")
    ]
    assert calls[-1] == ("results", "study_generators.json", "study_generators.md")


def test_a_missed_bar_fails_the_study_after_its_tables_are_written(monkeypatch, args):
    with pytest.raises(SystemExit, match="missed its bars for usit"):
        run_main(monkeypatch, args, found_rows(usit_cfg=0.5))
    assert json.loads((args.results_dir / "study_generators.json").read_text())["missed"]
    run_main(monkeypatch, args, found_rows(usit_cfg=0.5), max_train_steps=4)  # bars do not apply


@pytest.mark.slow
def test_the_whole_study_runs_and_runs_again(copies, monkeypatch, tmp_path, capsys):
    """In this process but for the trainings, with a fifth of the solver's steps."""
    launched = []

    def run_command(command, folder):
        launched.append(folder.name)
        return copies.run(command).returncode

    monkeypatch.setattr(study.demo, "run_command", run_command)
    monkeypatch.setattr(study.demo, "NUM_INFERENCE_STEPS", 10)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    words = ["--max_train_steps", "4", "--num_threads", "1", "--samples_per_class", "2", *folder_flags(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study_generators", *words])
    study.main()
    assert launched == ["tokenizer", "tokenizer-finetuned", "latents", *MODELS]
    results = tmp_path / "results" / "study_generators.json"
    report = json.loads(results.read_text())
    passes = {f"{row['model']}-{row['guidance']}": row["passes_per_step"] for row in report["rows"]}
    assert list(passes) == [row.name for row in ROWS]
    for name, count in passes.items():
        assert 1.5 < count < 2 if name.endswith(("cfg", "autoguidance")) else count == 1
    assert capsys.readouterr().out.count(": sampling\n") == len(ROWS)

    launched.clear()
    study.main()
    progress = capsys.readouterr().out.partition("# Generators")[0]
    assert all(f"{row.name}: sampling_seconds" in progress for row in ROWS)
    assert launched == ["latents"] and ": sampling\n" not in progress
    assert json.loads(results.read_text())["rows"] == report["rows"]
