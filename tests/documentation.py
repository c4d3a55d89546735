"""Code blocks of README and of the pages in `docs`: which there are, and whether their commands are real.

A block may carry a mark, `<!-- mark: NAME -->` on the line before it, that says why it is not run.
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
RECIPES = ROOT / "examples" / "recipes"
MARKS = {
    "install": "changes what is installed",
    "hours": "needs the time and the data of a real training",
    "hub": "needs the Hub",
    "gpu": "needs a GPU",
    "serves": "serves until it is stopped",
}


class Block(NamedTuple):
    """A fenced code block, and the title of the section that it stands in."""

    section: str
    language: str
    mark: str | None
    code: str


def read_blocks(path: Path) -> list[Block]:
    """The code blocks of a page."""
    blocks, section, mark = [], "", None
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("## "):
            section = line[3:]
        elif match := re.fullmatch(r"<!-- mark: (\w+) -->", line):
            mark = match.group(1)
            assert mark in MARKS, f"{path.name}: {mark} is none of {', '.join(MARKS)}"
            continue
        elif line.startswith("```"):
            code = []
            for inner in lines:
                if inner == "```":
                    break
                code.append(inner)
            blocks.append(Block(section, line[3:], mark, "\n".join(code)))
        mark = None
    return blocks


def read_commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def console_entries() -> dict[str, str]:
    """Commands that the package installs, each with the module of its `main`."""
    return dict(re.findall(r'"([\w-]+) = ([\w.]+):main"', (ROOT / "setup.py").read_text(encoding="utf-8")))


def check_command(words: list[str]) -> None:
    """Fail unless a command names an existing program or script, with flags and values that it takes."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), words
    elif program == "pip":
        extras = re.findall(r"\[(.*)\]", arguments[-1])
        known = re.findall(r'EXTRAS\["(\w+)"\] =|^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert {name for found in extras for name in found.split(",")} <= set(map("".join, known)), words
    elif program in ("accelerate", "python"):
        _check_launched(arguments)
    elif program in console_entries():
        _check_entry(program, arguments)
    else:
        assert program in ("hf", "npm", "source"), f"unknown program: {shlex.join(words)}"


def _check_entry(program: str, arguments: list[str]) -> None:
    module = importlib.import_module(console_entries()[program])
    if hasattr(module, "COMMANDS"):  # names of further commands
        name, *arguments = arguments
        module = importlib.import_module(module.COMMANDS[name][0].__module__)
    module.parse_options(arguments)


def _check_launched(arguments: list[str]) -> None:
    """What follows `python`, or `accelerate launch` with flags of its own."""
    if "-m" in arguments:
        name, *rest = arguments[arguments.index("-m") + 1 :]
        if name.startswith("benchmarks."):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
        elif name == "benchmarks":
            importlib.import_module("benchmarks.__main__").parse(rest)
        else:
            _check_entry(next(entry for entry, module in console_entries().items() if module == name), rest)
        return
    position = next(number for number, word in enumerate(arguments) if word.endswith(".py"))
    script, rest = arguments[position], arguments[position + 1 :]
    assert (ROOT / script).is_file(), script
    if script.startswith("examples/"):
        _parse_flags(Path(script).stem, rest)


def _parse_flags(script: str, words: list[str]) -> None:
    """Parse the flags of a script as it does, without importing it."""
    from maetok_hf.sampling import GenerateOptions
    from maetok_hf.training import run_options
    from maetok_hf.training.cache_options import CacheOptions
    from maetok_hf.training.configuration import add_flags, build, given_flags
    from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions
    from maetok_hf.training.recipes import parse_arguments
    from maetok_hf.training.sit_recipe import SiTRecipe
    from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    trainings = {
        "train_maetok": (TokenizerRecipe, run_options.TokenizerRunOptions),
        "train_sit": (SiTRecipe, run_options.SiTRunOptions),
        "train_sit_lora": (LoraRecipe, LoraRunOptions),
    }
    options = {"cache_latents": CacheOptions, "generate": GenerateOptions}
    if script in trainings:
        parse_arguments(parser, *trainings[script], RECIPES, words)
    elif script in options:
        add_flags(parser, options[script], "options")
        build(options[script], given_flags(parser.parse_args(words), options[script]))
    else:
        assert not words, f"the flags of {script} are not known here"
