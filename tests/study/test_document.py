"""The document: what is in it follows from the records, and what was written by hand stays."""

import json

import pytest

from maetok_hf.study import document
from maetok_hf.study.document import HAND_BEGIN, HAND_END, NO_CAUSES, check_comparable, write_document
from maetok_hf.study.presets import CPU
from maetok_hf.study.summaries import CLAIMS, difference_interval, interval
from maetok_hf.study.variants import VARIANTS
from tests.study.small import made_up_record, small_cell, small_preset, stand_in_pictures


SHIFTS = {"autoencoder": 0.3, "kl-vae": 0.0, "maetok": -0.2, "maetok-finetuned": -0.2}
PRESET = small_preset()


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(document, "draw_pictures", stand_in_pictures)


@pytest.fixture
def real_pictures():
    """Asked for by a test that is about the pictures, too."""


def records(shifts=SHIFTS, seeds=(0, 1, 2)):
    return [made_up_record(small_cell(name, seed), shift) for seed in seeds for name, shift in shifts.items()]


def write(folder, found, preset=PRESET) -> str:
    path = write_document(folder, preset, found)
    assert path == folder / preset.document
    return path.read_text()


def row_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return line.strip("| ").split(" | ")


def section(text: str, title: str) -> str:
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_has_means_and_intervals_over_seeds(tmp_path):
    text = write(tmp_path, records()).partition("\n## ")[0]
    for name, shift in SHIFTS.items():
        title, seeds, rfd, psnr, probe, *_ = row_of(text, VARIANTS[name].title)
        values = [1 + 0.01 * seed + shift for seed in range(3)]
        assert seeds == "3"
        assert rfd == interval([5 * value for value in values]).text(2)
        assert psnr == interval([20 * value for value in values]).text(2)
        assert probe == interval([50 * value for value in values]).text(1)
    head = row_of(text, "tokenizer")
    assert row_of(text, "AE")[head.index("gFD (digit classifier)")] == interval([9.1, 9.17, 9.24]).text(2)
    assert row_of(text, "AE")[head.index("ratio of the two")] == interval([2.6, 2.62, 2.64]).text(3)


def test_one_seed_is_shown_without_an_interval(tmp_path):
    text = write(tmp_path, records(seeds=[1]))
    assert row_of(text.partition("\n## ")[0], "AE")[1:3] == ["1", "6.55"]
    assert "±" not in section(text, "Orderings of the paper")


def test_orderings_have_their_verdicts(tmp_path):
    text = section(write(tmp_path, records()), "Orderings of the paper")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if " better than " in line]
    core = [claim for claim in CLAIMS if {claim.better, claim.worse} <= SHIFTS.keys()]
    assert len(rows) == len(core) == 15
    found = {(row[0], row[1]): (row[3], row[4]) for row in rows}
    low = "MAETok (masks, HOG) better than AE"
    difference = difference_interval(
        [7 * (0.8 + 0.01 * s) for s in range(3)], [7 * (1.3 + 0.01 * s) for s in range(3)]
    )
    assert found[low, "gFD (digit classifier)"] == (difference.text(2), "yes")
    assert found[low, "linear probe (%)"][1] == "no"
    tuned = "MAETok + decoder fine-tuning better than MAETok (masks, HOG)"
    assert found[tuned, "gFD (digit classifier)"][1] == "not resolved"
    assert f"{len(CLAIMS) - len(core)} further orderings need cells of `--full`" in text


def test_all_factors_are_tabled_once_there_are_enough(tmp_path):
    names = [name for name, variant in VARIANTS.items() if variant.factors is not None]
    assert "## Masks x learnable tokens x targets" not in write(tmp_path, records())
    text = section(write(tmp_path, records(dict.fromkeys(names, 0.0))), "Masks x learnable tokens x targets")
    marks = [line.strip("| ").split(" | ")[:3] for line in text.splitlines() if line.startswith(("| yes", "| no"))]
    assert len(marks) == 8 == len({tuple(mark) for mark in marks}) and marks[0] == ["yes"] * 3
    (maetok,) = [line for line in text.splitlines() if line.startswith("| yes | yes | yes |")]
    assert maetok.endswith("|  / 13.54 |")


def test_positions_have_a_table_of_their_own(tmp_path):
    shifts = {"two-sizes-rope": 0.0, "two-sizes-absolute": 0.1}
    text = write(tmp_path / "alone", records(shifts))
    assert "rFD (digit classifier) at 32" in section(text, "Positions at a second resolution")
    row = row_of(text, "two resolutions, rotary positions")
    assert row[1:4] == ["3", interval([5.0, 5.05, 5.1]).text(2), interval([20.0, 20.2, 20.4]).text(2)]
    assert "## Pictures" not in text and not (tmp_path / "alone" / "study").exists()
    both = write(tmp_path / "both", records(SHIFTS | shifts))
    assert row_of(both, "two resolutions, rotary positions") == row
    assert "two resolutions" not in both.partition("\n## ")[0]


def test_what_was_written_by_hand_stays(tmp_path):
    text = write(tmp_path, records())
    assert f"{HAND_BEGIN}\n\n{NO_CAUSES}\n\n{HAND_END}" in text
    causes = "Because of *this*,\n\n| a | table |\n| --- | --- |\n\nand that: ±."
    (tmp_path / PRESET.document).write_text(text.replace(NO_CAUSES, causes))
    again = write(tmp_path, records(seeds=(0, 1)))
    assert f"{HAND_BEGIN}\n\n{causes}\n\n{HAND_END}" in again
    assert again.count(causes) == 1 and NO_CAUSES not in again
    assert write(tmp_path, records(seeds=(0, 1))) == again


@pytest.mark.parametrize("mark", [HAND_BEGIN, HAND_END])
def test_a_document_without_the_marks_is_left_alone(tmp_path, mark):
    path = tmp_path / PRESET.document
    text = write(tmp_path, records()).replace(mark, "")
    path.write_text(text)
    with pytest.raises(ValueError, match="lacks the marks"):
        write(tmp_path, records())
    assert path.read_text() == text


@pytest.mark.parametrize("changed", ["data", "classifier", "measures"])
def test_records_that_cannot_be_compared_are_refused(tmp_path, changed):
    found = records()
    found[-1] = made_up_record(small_cell("maetok-finetuned", 2), **{changed: {"other": 1}})
    with pytest.raises(
        ValueError, match=f"differ in '{changed}', such as autoencoder-seed0 and maetok-finetuned-seed2"
    ):
        write(tmp_path, found)
    assert not any(tmp_path.iterdir())
    check_comparable(records())


def test_without_records_nothing_is_written(tmp_path):
    assert write_document(tmp_path, PRESET, []) is None
    assert not any(tmp_path.iterdir())


def test_the_same_records_give_the_same_bytes(tmp_path, real_pictures):
    # as they come back from their files
    again = json.loads(json.dumps(records()))
    assert write(tmp_path / "one", records()) == write(tmp_path / "two", again)
    names = sorted(path.name for path in (tmp_path / "one" / "study").iterdir())
    assert names == ["cpu-modes.png", "cpu-probe-and-distance.png"]
    for name in names:
        pictures = [(tmp_path / folder / "study" / name).read_bytes() for folder in ("one", "two")]
        assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")


def test_the_protocol_says_how_it_was_done(tmp_path):
    facts = {"held_out_accuracy": 0.987, "digest": "0123456789abcdef", "distance_of_held_out_images": 1.25}
    cells = tmp_path / "study" / "cells"
    cells.mkdir(parents=True)
    (cells / "cpu-classifier.json").write_text(json.dumps(facts))
    found = records()
    found[0]["machine"] = found[0]["machine"] | {"processors": 64}
    text = section(write(tmp_path, found), "Protocol")
    assert "knows 98.7 % of held-out images; digest 0123456789ab; distance of held-out to training images 1.25" in text
    assert "budget: 4 steps of each tokenizer, 4 more for decoder fine-tuning, 4 of each generator" in text
    assert "- time: 48 minutes" in text, "12 cells, 4 parts of a minute each"
    assert text.count("- machine: ") == 2 and "- machine: 64 CPU cores" in text
    # the longest list of commands: those of a fine-tuned tokenizer and of its base
    assert text.count("accelerate launch") == 4 and "examples/train_sit.py" in text
    assert str(tmp_path) not in text


def test_samples_are_those_of_the_first_seed(tmp_path):
    text = section(write(tmp_path, records(seeds=(2, 1))), "Pictures")
    for name in SHIFTS:
        assert text.count(f"(study/cells/cpu-{name}-seed1.png)") == 1
    assert "seed2.png" not in text


def test_documents_of_presets_differ_in_name():
    assert CPU.document == "study.md" and small_preset(document="other.md").document == "other.md"
