"""README's code runs or carries a mark that says what it needs; what `docs` shares with it is in `test_docs`."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.documentation import README, ROOT, read_blocks


BLOCKS = read_blocks(README)


def test_marks_are_few_and_the_quick_start_has_none():
    assert Counter(block.mark for block in BLOCKS if block.mark) == {"hours": 3, "hub": 2, "gpu": 1}
    quick_start = [block for block in BLOCKS if block.section == "Quick start"]
    assert len(quick_start) == 5
    assert not any(block.mark for block in quick_start)


def make_targets() -> list[str]:
    """Targets of all unmarked `make` lines; any other unmarked shell command is an error."""
    lines = [
        line for block in BLOCKS if block.language == "bash" and not block.mark for line in block.code.splitlines()
    ]
    matches = [re.fullmatch(r"make ([\w-]+) +#.*", line) for line in lines]
    assert all(matches), lines
    return [match.group(1) for match in matches]


@pytest.mark.parametrize("target", sorted(set(make_targets())))
def test_make_commands_exist(target):
    result = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ci_runs_the_commands_of_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make demo", "make docs", "make test", "make test-slow", "make quality"} <= set(ci)


def test_readme_names_existing_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A folder in which the demonstration has run: the command of `make demo`, with its training cut short."""
    folder = tmp_path_factory.mktemp("readme")
    # the suite itself may run under `make`, which would then print the folders it enters
    command = ["make", "--dry-run", "--no-print-directory", "demo"]
    dry_run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    command = dry_run.stdout.splitlines()[-1].split()
    assert command == [".venv/bin/python", "examples/demo.py", "--output_dir", "outputs/demo"]
    short = ["--max_train_steps", "4", "--samples_per_class", "2"]
    result = subprocess.run(
        [sys.executable, str(ROOT / command[1]), *command[2:], *short], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_python_blocks_run(demo_folder):
    for block in BLOCKS:
        if block.language == "python" and not block.mark:
            result = subprocess.run(
                [sys.executable, "-W", "error::UserWarning", "-c", block.code],
                cwd=demo_folder,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, block.code + "\n" + result.stderr[-4000:]
    assert (demo_folder / "seven.png").is_file()


@pytest.mark.slow
def test_demo_leaves_what_it_promises_and_reuses_it(demo_folder):
    import json

    import numpy as np

    outputs = demo_folder / "outputs" / "demo"
    with np.load(outputs / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * 10
    report = json.loads((outputs / "report.json").read_text())
    assert report["threads"] >= 1
    assert set(report["stages"]) == {"tokenizer", "decoder", "generator"}
    for picture in ("samples.png", "reconstructions.png"):
        assert (outputs / picture).stat().st_size > 1000

    before = (outputs / "tokenizer" / "train_report.json").stat().st_mtime_ns
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--output_dir", "outputs/demo"]
    command += ["--max_train_steps", "4", "--samples_per_class", "2"]
    again = subprocess.run(command, cwd=demo_folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (outputs / "tokenizer" / "train_report.json").stat().st_mtime_ns == before
    with np.load(outputs / "samples.npz") as samples:
        assert np.array_equal(samples["arr_0"], images), "the same seeds give the same images"

    # a stage that was trained from an earlier tokenizer is not taken for one of the present tokenizer
    for stage in ("tokenizer-finetuned", "generator"):
        file = outputs / stage / "train_report.json"
        whole = file.read_text()
        file.write_text(whole.replace('"given_tokenizer": "', '"given_tokenizer": "0'))
        stale = subprocess.run(command, cwd=demo_folder, capture_output=True, text=True)
        assert stale.returncode != 0 and f"{stage} was trained from another tokenizer" in stale.stderr
        file.write_text(whole)
