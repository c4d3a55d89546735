"""The documentation: its code runs, its commands and names exist, and nothing is left out of it."""

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

import maetok_hf
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from tests.documentation import (
    PAGES,
    README,
    RECIPES,
    ROOT,
    check_command,
    console_entries,
    read_blocks,
    read_commands,
)
from tests.pipelines.helpers import tiny_pipeline


DOCS = ROOT / "docs"
TRAINING = DOCS / "training.md"
# the sizes of the demonstration's latents, which pages state
VAE = {"num_latent_tokens": 8, "latent_channels": 16}
TRANSFORMER = {"sample_size": 8, "in_channels": 16}


def by_name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    """A folder as a reader has it after the quick start, with a pipeline of random weights, and some images."""
    folder = tmp_path_factory.mktemp("docs")
    id2label = {digit: str(digit) for digit in range(10)}
    pipe = tiny_pipeline("sde", id2label, vae=VAE, transformer=TRANSFORMER)
    pipe.save_pretrained(folder / "outputs" / "demo" / "pipeline")
    image = pipe(class_labels=7, num_inference_steps=2).images[0]
    image.save(folder / "seven.png")
    (folder / "my-images" / "train" / "7").mkdir(parents=True)
    image.save(folder / "my-images" / "train" / "7" / "0000.png")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page != TRAINING], ids=by_name)
def test_python_blocks_run(page, reader_folder, monkeypatch):
    monkeypatch.chdir(reader_folder)
    for block in read_blocks(page):
        if block.language == "python" and not block.mark:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                exec(compile(block.code, f"{page.name}, {block.section}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [README, *PAGES], ids=by_name)
def test_languages_are_known_and_python_blocks_import_what_exists(page):
    for block in read_blocks(page):
        assert block.language.startswith("{") or block.language in ("", "python", "bash", "yaml", "text"), block
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "maetok_hf":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block.code


@pytest.mark.parametrize("page", [README, *PAGES], ids=by_name)
def test_commands_are_real(page):
    for block in read_blocks(page):
        if block.language == "bash":
            for words in read_commands(block.code):
                check_command(words)


def test_recipes_in_pages_are_valid():
    import yaml

    blocks = [block for page in PAGES for block in read_blocks(page) if block.language == "yaml"]
    assert blocks
    for block in blocks:
        values = yaml.safe_load(block.code)
        base = values.pop("extends")
        load_recipe(TokenizerRecipe if "maetok" in base else SiTRecipe, RECIPES / f"{base}.yaml", values)


def test_most_blocks_are_not_marked():
    blocks = [block for page in PAGES for block in read_blocks(page) if block.language in ("python", "bash")]
    unmarked = [block for block in blocks if not block.mark]
    assert len(unmarked) > len(blocks) / 2
    assert not any(block.mark for block in read_blocks(TRAINING) if block.mark != "hub")


def test_generated_tables_are_up_to_date():
    command = [sys.executable, str(DOCS / "tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_recipe_is_in_the_tables():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")]
    assert [name for name in names if text.count(f"| [{name}](") != 1] == []


def test_every_command_has_its_place():
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "examples").glob("*.py")]
    missing = [name for name in [*console_entries(), *scripts] if name not in text]
    assert missing == []


def documented_names() -> set[str]:
    """Full names of what the pages of the reference describe."""
    found = set()
    for page in (DOCS / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for kind, name, options in re.findall(r"^\.\. auto(\w+):: ([\w.]+)\n((?:   .*\n)*)", text, re.MULTILINE):
            full = name if name.startswith("maetok_hf") else f"maetok_hf.{name}"
            found.add(full)
            if kind == "module":
                assert ":members:" in options, name
                excluded = re.findall(r"\w+", "".join(re.findall(r":exclude-members: (.*)", options)))
                public = getattr(importlib.import_module(full), "__all__", [])
                found |= {f"{full}.{member}" for member in public if member not in excluded}
    return found


def test_every_exported_name_is_in_the_reference():
    documented = documented_names()
    modules = [maetok_hf]
    modules += [
        importlib.import_module(f"maetok_hf.{info.name}")
        for info in pkgutil.iter_modules(maetok_hf.__path__)
        if not info.name.startswith("_")
    ]
    # what the root exports is described under that name
    root = {f"maetok_hf.{name}" for name in maetok_hf.__all__}
    missing = root - documented
    for module in modules[1:]:
        for name in getattr(module, "__all__", ()):
            if name not in maetok_hf.__all__ and f"{module.__name__}.{name}" not in documented:
                missing.add(f"{module.__name__}.{name}")
    assert missing == set()


def test_every_module_of_training_is_in_the_reference():
    documented = documented_names()
    import maetok_hf.training

    names = [f"maetok_hf.training.{info.name}" for info in pkgutil.iter_modules(maetok_hf.training.__path__)]
    assert [name for name in names if name not in documented] == []


def test_every_page_is_reached_from_the_first():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for tree in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in tree.split()}
    assert {page.stem for page in PAGES} - listed == {"index"}


def load_extension(name):
    path = DOCS / "_extensions" / f"{name}.py"
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_result_is_a_page():
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    pages = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "results").glob("*.md")}
    assert pages.keys() == results
    assert all(f"benchmarks/results/{name}\n" in text for name, text in pages.items())


def test_docstrings_become_markdown():
    docstring = """
    What it does, as [`Other.method`] and a [page](https://example.org) with [`code`](x.md) say.

    Args:
        first (`int` or `str`, *optional*, defaults to 1): A number.
        second, third (`float`):
            Two more:
            - with a list.
        **rest (`Any`): Others.

    Returns:
        [`~maetok_hf.data.ImageSource`]: It.

    Raises:
        ValueError: If it
            is wrong.

    Examples:

    ```py
    >>> f(1)
    ```
    """
    import inspect

    lines = load_extension("markdown_docstrings").to_markdown(inspect.cleandoc(docstring).splitlines())
    assert "\n".join(lines) == inspect.cleandoc(
        """
        What it does, as {docstring}`Other.method` and a [page](https://example.org) with [`code`](x.md) say.


        **Parameters**

        - **first** (`int` or `str`, *optional*, defaults to 1): A number.
        - **second, third** (`float`):
          Two more:
          - with a list.
        - **\\*\\*rest** (`Any`): Others.


        **Returns**

        {docstring}`~maetok_hf.data.ImageSource`: It.


        **Raises**

        - **ValueError**: If it
          is wrong.


        **Examples**


        ```py
        >>> f(1)
        ```
        """
    )


def test_links_out_of_the_documentation_lead_somewhere_in_the_site(tmp_path):
    (tmp_path / "folder").mkdir()
    text = (
        "[r](../benchmarks/results/x.md) [c](../model_cards/y.md) [f](folder) [s](study.md) [p](other.md) "
        "![i](images/z.png)\n\nstudy\nother\n"
    )
    read = load_extension("repository_pages").read_source
    source = [text]
    read(SimpleNamespace(srcdir=tmp_path), "page", source)
    assert source == [
        "[r](/results/x.md) [c](path:../model_cards/y.md) f s [p](other.md) ![i](images/z.png)\n\nother\n"
    ]
    (tmp_path / "study.md").touch()
    source = [text]
    read(SimpleNamespace(srcdir=tmp_path), "page", source)
    assert "[s](study.md)" in source[0] and "\nstudy\nother\n" in source[0]


@pytest.mark.slow
def test_training_on_ones_own_data_works_as_written(tmp_path):
    from tests.loopback_hub import serve_hub

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = [(block.language, block.code) for block in read_blocks(TRAINING) if block.language in ("python", "bash")]
    with serve_hub() as hub:
        result = subprocess.run(
            [sys.executable, "-m", "tests.run_blocks"],
            input=json.dumps(blocks),
            cwd=tmp_path,
            env=os.environ | hub.environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        files = hub.repositories["user/my-digits"].files
    assert {"README.md", "model_index.json", "transformer/config.json"} <= set(files)
    assert len(list((tmp_path / "runs" / "samples" / "images").rglob("*.png"))) == 20
    assert (tmp_path / "runs" / "reconstruction" / "reconstruction.json").is_file()
