"""The study as a program: what is finished is found again, whatever stopped it, and nothing is mixed up."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.study import document, running
from maetok_hf.study.cells import RECORDED_ROOT, Cell
from maetok_hf.study.options import StudyOptions
from maetok_hf.study.presets import PRESETS
from maetok_hf.study.running import Study
from tests.study.small import BUDGET, ROOT, StandInTrainings, small_cell, small_preset, stand_in_pictures
from tests.testing_utils import start_and_kill


EXAMPLES = ROOT / "examples"
RECIPES_READ = {}
NAMES = ["cpu-maetok-seed0", "cpu-maetok-finetuned-seed0"]


@pytest.fixture(autouse=True)
def threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


real_recipe_of = Cell.recipe_of


def recipe_of(cell: Cell, name: str, words: tuple[str, ...]) -> dict | None:
    if words not in RECIPES_READ:
        (stage,) = [stage for stage in cell.stages(RECORDED_ROOT) if stage.name == name]
        assert tuple(stage.words) == words
        RECIPES_READ[words] = real_recipe_of(cell, stage)
    return RECIPES_READ[words]


@pytest.fixture
def trainings(monkeypatch):
    """The small preset, with stand-ins for the training commands; a list of those that ran."""
    stand_in = StandInTrainings()
    monkeypatch.setitem(PRESETS, "cpu", small_preset())
    monkeypatch.setattr(Study, "run_stage", lambda study, cell, stage: stand_in(study, cell, stage))
    # what takes the time of a study this small: reading recipes many times, and pictures
    monkeypatch.setattr(Cell, "recipe_of", lambda cell, stage: recipe_of(cell, stage.name, tuple(stage.words)))
    monkeypatch.setattr(document, "draw_pictures", stand_in_pictures)
    return stand_in.ran


@pytest.fixture
def study(tmp_path, trainings):
    """Run the study, by default of a tokenizer and the same with its decoder fine-tuned."""

    def run(output="outputs", results="docs", **options):
        folders = {"output_dir": str(tmp_path / output), "results_dir": str(tmp_path / results)}
        options = {"variants": ["maetok", "maetok-finetuned"], "seeds": [0], "num_threads": 1} | folders | options
        found = Study(StudyOptions(**options), EXAMPLES)
        found.run()
        return found

    return run


def records_of(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("cpu-*-seed*.json")}


def without_seconds(record: dict) -> dict:
    parts = record["measured"].items()
    measured = {name: {k: v for k, v in part.items() if k != "seconds"} for name, part in parts}
    return record | {"measured": measured, "seconds": None}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_study_trains_measures_and_writes_what_it_found(study, trainings, tmp_path):
    found = study()
    assert trainings == [
        *((NAMES[0], stage) for stage in ("tokenizer", "latents", "generator")),
        (NAMES[1], "tokenizer"),
    ]
    records = records_of(tmp_path / "docs" / "study" / "cells")
    assert records == records_of(tmp_path / "outputs" / "cells") and list(sorted(records)) == sorted(NAMES)
    base, tuned = (records[name] for name in NAMES)
    assert base["identity"] == json.loads(json.dumps(found.identity(found.cells[0])))
    assert base["seconds"].keys() == {
        *("tokenizer", "generator"),
        *(f"measuring {part}" for part in ("reconstruction", "latents", "generator", "samples")),
    }
    assert base["seconds"]["tokenizer"] == 2.0
    # the same latents and the same generator, which is measured and counted once
    assert tuned["measured"]["generator"] == base["measured"]["generator"]
    numbers = [without_seconds(record)["measured"] for record in (base, tuned)]
    assert numbers[0]["latents"] == numbers[1]["latents"]
    assert (
        numbers[0]["reconstruction"] != numbers[1]["reconstruction"] and numbers[0]["samples"] != numbers[1]["samples"]
    )
    assert "measuring generator" not in tuned["seconds"]
    text = (tmp_path / "docs" / "study.md").read_text()
    assert "| MAETok + decoder fine-tuning | 1 |" in text
    for name in NAMES:
        assert (tmp_path / "docs" / "study" / "cells" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"study/cells/{name}.png" in text
    assert str(tmp_path) not in json.dumps(records) + text


def test_a_finished_study_runs_nothing_again(study, trainings, tmp_path, monkeypatch):
    study()
    before, count = state_of(tmp_path / "docs"), len(trainings)
    monkeypatch.setattr(Study, "measure", None)
    study()
    after = state_of(tmp_path / "docs")
    assert len(trainings) == count
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    kept = [name for name in after if name.endswith((".json", ".safetensors"))]
    assert len(kept) == 4 and all(after[name] == before[name] for name in kept), "not even written again"
    # the records alone are enough, with their classifier, as they are after a clone
    study(output="elsewhere")
    assert len(trainings) == count
    assert records_of(tmp_path / "elsewhere" / "cells") == records_of(tmp_path / "outputs" / "cells")


def test_parts_that_were_measured_are_kept(study, trainings, tmp_path, monkeypatch):
    study()
    expected, count = records_of(tmp_path / "outputs" / "cells"), len(trainings)
    for folder in ("outputs/cells", "docs/study/cells"):
        (tmp_path / folder / f"{NAMES[0]}.json").unlink()
    (tmp_path / "outputs" / "cpu" / "maetok-seed0" / "measures" / "reconstruction.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(running, "measure_generator", None)
        study()
    found = records_of(tmp_path / "outputs" / "cells")
    assert len(trainings) == count
    assert without_seconds(found[NAMES[0]]) == without_seconds(expected[NAMES[0]])
    for name in ("latents", "generator", "samples"):
        assert found[NAMES[0]]["measured"][name] == expected[NAMES[0]]["measured"][name], "seconds, too"
    assert found[NAMES[1]] == expected[NAMES[1]]


def test_checkpoints_go_once_the_record_is_there(study, tmp_path, monkeypatch):
    class Fault(Exception):
        pass

    def fault(*arguments):
        raise Fault

    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(Study, "sample", fault)
        study(variants=["maetok"])
    folder = tmp_path / "outputs" / "cpu" / "maetok-seed0"
    assert len(list(folder.glob("*/checkpoint-*"))) == 5
    study(variants=["maetok"])
    assert not list(folder.glob("*/checkpoint-*"))
    assert (folder / "tokenizer" / "config.json").is_file() and (folder / "generator" / "model_index.json").is_file()


def test_a_base_with_a_record_is_trained_again_only_for_what_is_fine_tuned_from_it(study, trainings, tmp_path):
    study(variants=["maetok"])
    expected = records_of(tmp_path / "docs" / "study" / "cells")
    shutil.rmtree(tmp_path / "outputs")
    trainings.clear()
    study()
    assert [name for name, stage in trainings] == [NAMES[0]] * 3 + [NAMES[1]]
    found = records_of(tmp_path / "docs" / "study" / "cells")
    assert found[NAMES[0]] == expected[NAMES[0]]
    assert not list((tmp_path / "outputs" / "cpu").glob("*/*/checkpoint-*"))


def test_a_fine_tuned_decoder_of_another_encoder_is_refused(study, tmp_path):
    study(variants=["maetok"])
    base = tmp_path / "outputs" / "cpu" / "maetok-seed0" / "tokenizer"
    tuned = tmp_path / "outputs" / "cpu" / "maetok-finetuned-seed0" / "tokenizer"
    shutil.copytree(base, tuned)
    tokenizer = AutoencoderMAE.from_pretrained(tuned)
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).add_(1)
    tokenizer.save_pretrained(tuned)
    with pytest.raises(ValueError, match=f"The encoder of {NAMES[1]} is not that of {NAMES[0]}: its base was trained"):
        study()
    assert NAMES[1] not in records_of(tmp_path / "outputs" / "cells")


def test_a_folder_of_other_settings_is_refused(study, trainings, tmp_path, monkeypatch):
    study(variants=["maetok"])
    count = len(trainings)
    longer = dataclasses.replace(BUDGET, generator_steps=5)
    monkeypatch.setitem(PRESETS, "cpu", small_preset(budget=longer))
    with pytest.raises(ValueError, match="was begun with other settings: remove it, or choose another `output_dir`"):
        study(variants=["maetok"])
    assert len(trainings) == count
    study(output="other", variants=["maetok"])
    assert len(trainings) == 2 * count, "a record of other settings does not count"


def test_the_classifier_of_the_results_is_the_one_that_measures(study, tmp_path, monkeypatch):
    first = study(variants=["maetok"])
    cells = tmp_path / "docs" / "study" / "cells"
    weights = (cells / "cpu-classifier.safetensors").read_bytes()
    facts = json.loads((cells / "cpu-classifier.json").read_text())
    assert facts["digest"] == first.classifier.digest and facts["distance_of_held_out_images"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(running, "describe_classifier", None)
        again = study(output="elsewhere", variants=["maetok"])
        assert again.classifier.digest == first.classifier.digest
        (cells / "cpu-classifier.safetensors").unlink()
        study(output="elsewhere", variants=["maetok"])
    assert (cells / "cpu-classifier.safetensors").read_bytes() == weights, "lost weights come back"


def test_records_of_another_classifier_are_left_out_until_they_are_measured_again(study, tmp_path, monkeypatch):
    study(variants=["maetok"])
    path = tmp_path / "docs" / "study" / "cells" / "cpu-maetok-seed7.json"
    record = json.loads((path.parent / "cpu-maetok-seed0.json").read_text())
    identity = small_cell("maetok", 7).identity(record["identity"]["data"], "another")
    path.write_text(json.dumps(record | {"identity": identity}))
    study(variants=["maetok"])
    assert "| MAETok (masks, HOG) | 1 |" in (tmp_path / "docs" / "study.md").read_text()
    with pytest.raises(ValueError, match="Records differ in 'classifier'"):
        study(report_only=True)


def test_records_of_other_seeds_and_variants_are_reported(study, tmp_path):
    study(variants=["maetok"], seeds=[3])
    study(variants=["two-sizes-rope"], seeds=[1])
    text = (tmp_path / "docs" / "study.md").read_text()
    assert "| MAETok (masks, HOG) | 1 |" in text and "| two resolutions, rotary positions | 1 |" in text
    record = records_of(tmp_path / "docs" / "study" / "cells")["cpu-two-sizes-rope-seed1"]
    assert record["measured"].keys() == {"reconstruction", "second_reconstruction"}
    assert record["measured"]["reconstruction"]["psnr"] != record["measured"]["second_reconstruction"]["psnr"]


def test_a_dry_run_says_what_is_left_and_writes_nothing(study, tmp_path, capsys):
    study(dry_run=True)
    text = capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    assert text.count("    accelerate launch") == 4 and "2 cells, 1 minutes to go" in text
    study(variants=["maetok"])
    before = state_of(tmp_path)
    capsys.readouterr()
    study(dry_run=True)
    text = capsys.readouterr().out
    assert state_of(tmp_path) == before
    assert f"{NAMES[0]}: done" in text and text.count("    accelerate launch") == 1


def test_a_report_writes_the_document_and_pictures_alone(study, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="have no records of this study"):
        study(report_only=True)
    assert not any(tmp_path.iterdir())
    study(variants=["maetok"])
    before = state_of(tmp_path)
    (tmp_path / "docs" / "study.md").unlink()
    study(report_only=True)
    after = state_of(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    written = {name for name in after if after[name] != before[name]}
    assert written <= {"docs/study.md", "docs/study/cpu-modes.png", "docs/study/cpu-probe-and-distance.png"}


def test_a_failed_training_ends_the_study_with_its_status(study, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real command, which fails
    monkeypatch.setitem(PRESETS, "cpu", small_preset())
    monkeypatch.setattr(running, "run_command", lambda command, folder: 3)
    with pytest.raises(SystemExit, match="train_maetok.py ended with status 3: the same command goes on"):
        study()


@pytest.fixture
def command(monkeypatch):
    """The example in this process: `command(*words)`."""
    spec = importlib.util.spec_from_file_location("study_latents", EXAMPLES / "study_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return lambda *words: module.main(list(map(str, words)))


def test_the_command_refuses_what_cannot_be_studied(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("--max_train_steps", "4")
    assert "`max_train_steps` needs another `results_dir`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="have no records of this study"):
        command("--report_only", "--results_dir", tmp_path, "--output_dir", tmp_path)


def kill_at(words: list[str], sign: Path) -> None:
    """Start the study, and kill it and all that it started as soon as a file is there."""
    start_and_kill([sys.executable, str(EXAMPLES / "study_latents.py"), *words], sign.exists)


@pytest.mark.slow
def test_a_real_study_is_the_same_after_it_was_killed_and_runs_nothing_twice(
    command, copies, monkeypatch, tmp_path, capfd
):
    """One tokenizer of 24 steps, its latents, a generator of 24 steps, and all that is measured."""
    monkeypatch.setattr(running, "run_command", lambda words, folder: copies.run(words).returncode)
    outputs, results = tmp_path / "outputs", tmp_path / "results"
    words = ["--variants", "autoencoder", "--seeds", "0", "--num_threads", "1", "--max_train_steps", "24"]
    words += ["--output_dir", str(outputs), "--results_dir", str(results)]
    command(*words)
    assert capfd.readouterr().out.count("\n=== cpu-autoencoder-seed0, ") == 3
    name = "cpu-autoencoder-seed0"
    cells, folder = results / "study" / "cells", outputs / "cpu" / "autoencoder-seed0"
    record = records_of(cells)[name]
    assert [point["step"] for point in record["measured"]["generator"]["curve"]] == [6, 12, 18, 24]
    assert record["measured"]["latents"]["shape"] == [8, 16] and record["seconds"]["tokenizer"] > 0
    text_of_document = (results / "study.md").read_bytes()

    command(*words)
    text = capfd.readouterr().out
    assert "===" not in text and "measuring" not in text and f"{name}: done" in text
    assert (results / "study.md").read_bytes() == text_of_document and records_of(cells)[name] == record

    # without the record and what was measured of the tokenizer, only that is measured again
    for path in [cells / f"{name}.json", outputs / "cells" / f"{name}.json"]:
        path.unlink()
    for part in ("reconstruction", "latents"):
        (folder / "measures" / f"{part}.json").unlink()
    trained = state_of(folder / "generator")
    command(*words)
    text = capfd.readouterr().out
    assert "===" not in text and f"{name}: measuring" in text
    assert state_of(folder / "generator") == trained
    assert without_seconds(records_of(cells)[name]) == without_seconds(record)

    # without the generator it is trained again, and killed in the middle of that
    for path in [cells / f"{name}.json", outputs / "cells" / f"{name}.json"]:
        path.unlink()
    for path in [folder / "generator", folder / "measures"]:
        shutil.rmtree(path)
    kill_at(words, folder / "generator" / "checkpoint-6" / "trainer_state.json")
    assert not (folder / "generator" / "train_report.json").exists() and not records_of(cells)
    capfd.readouterr()
    command(*words)
    text = capfd.readouterr().out
    assert text.count("\n=== ") == 1 and f"=== {name}, generator" in text
    assert without_seconds(records_of(cells)[name]) == without_seconds(record)
