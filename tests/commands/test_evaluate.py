"""`maetok-eval` finds its evaluations by name, and says which there are."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from maetok_hf import __version__
from maetok_hf.commands import analyze_latents, evaluate


@pytest.mark.parametrize("name", ["maetok-analyze", "maetok-convert", "maetok-eval"])
def test_console_entries_lead_to_commands(name):
    [entry] = [entry for entry in entry_points(group="console_scripts") if entry.name == name]
    assert callable(entry.load())


@pytest.mark.parametrize("name", evaluate.COMMANDS)
def test_every_evaluation_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: maetok-eval {name}" in capsys.readouterr().out


def test_help_names_the_evaluations_and_what_they_measure(capsys):
    evaluate.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in ("tokenizer", "generation", "guidance"))
    assert all(f"\n  maetok-eval {name} --" in printed for name in ("tokenizer", "generation", "guidance"))
    assert "exit codes: 0 when all is done" in printed
    evaluate.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words,given", [([], "got nothing"), (["sampler"], "got 'sampler'")])
def test_other_names_are_refused(words, given, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(words)
    assert ended.value.code == 2
    assert given in capsys.readouterr().err


def test_module_is_the_command():
    command = [sys.executable, "-m", "maetok_hf.commands.evaluate", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == __version__


@pytest.mark.parametrize("name", [*(f"maetok-eval {name}" for name in evaluate.COMMANDS), "maetok-analyze"])
def test_help_has_examples_and_exit_codes(name, capsys):
    program, *words = name.split()
    main = analyze_latents.main if program == "maetok-analyze" else evaluate.main
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"examples:\n  {name} --" in printed and "exit codes: 0 when all is done" in printed
    with pytest.raises(SystemExit):
        main([*words, "--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_what_the_user_can_mend_is_a_line_and_status_1(tmp_path):
    command = [sys.executable, "-m", "maetok_hf.commands.evaluate", "generation", "--samples", str(tmp_path / "none")]
    command += ["--reference", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("maetok-eval generation: error: ")
