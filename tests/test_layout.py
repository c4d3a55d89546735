"""The map of the code that docs/design.md describes: which part may import which, and how long a file may be."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "maetok_hf"
LINE_CAP = 600

# parts of the package that a part may import, besides itself
INNER = {
    "seeding": set(),
    "moments": set(),
    "models": set(),
    "schedulers": set(),
    "pipelines": {"models", "schedulers"},
    "conversion": {"models"},
    "analysis": {"data", "models", "moments", "seeding", "training"},
    "data": {"seeding"},
    "training": {"models", "moments", "schedulers", "seeding"},
    "sampling": {"models", "pipelines", "schedulers", "seeding", "training"},
    "evaluation": {"data", "models", "moments", "pipelines", "sampling", "training"},
    "metrics": {"data", "evaluation", "moments"},
    "study": {"analysis", "data", "evaluation", "models", "moments", "pipelines", "sampling", "seeding", "training"},
    "page": {"data", "models", "pipelines", "sampling", "schedulers", "seeding", "training"},
    "commands": {
        "analysis",
        "conversion",
        "data",
        "evaluation",
        "models",
        "page",
        "pipelines",
        "sampling",
        "schedulers",
        "training",
    },
    "_register": {"models", "pipelines"},
    "__init__": {"_register", "conversion", "models", "pipelines", "schedulers"},
}
# third-party packages that a part may import, anywhere in its files
OUTER = {
    "seeding": {"torch"},
    "moments": {"torch"},
    "models": {"diffusers", "huggingface_hub", "torch"},
    "schedulers": {"diffusers", "numpy", "torch"},
    "pipelines": {"diffusers", "numpy", "torch"},
    "conversion": {"diffusers", "huggingface_hub", "safetensors", "timm", "torch"},
    "analysis": {"matplotlib", "numpy", "torch", "umap"},
    "data": {"PIL", "datasets", "fsspec", "mlxtend", "numpy", "pyarrow", "torch"},
    "sampling": {"PIL", "diffusers", "numpy", "torch"},
    "evaluation": {"diffusers", "huggingface_hub", "numpy", "torch", "torch_fidelity", "transformers"},
    "metrics": {"datasets", "evaluate", "numpy", "torch"},
    "study": {"matplotlib", "safetensors", "scipy", "torch"},
    "page": {"PIL", "diffusers", "fastapi", "gradio", "matplotlib", "numpy", "torch", "uvicorn"},
    "commands": {"diffusers", "huggingface_hub", "matplotlib", "safetensors", "torch"},
    "training": {
        "PIL",
        "diffusers",
        "huggingface_hub",
        "lpips",
        "numpy",
        "peft",
        "safetensors",
        "timm",
        "torch",
        "torchmetrics",
        "torchvision",
        "tqdm",
        "trackio",
        "transformers",
        "yaml",
    },
    "_register": {"diffusers"},
    "__init__": {"diffusers"},
}
# heavy or optional packages must not be imported at module top
LAZY = {
    "datasets",
    "fsspec",
    "huggingface_hub",
    "lpips",
    "matplotlib",
    "mlxtend",
    "peft",
    "pyarrow",
    "scipy",
    "timm",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "trackio",
    "transformers",
    "umap",
}
# the only modules of the package that know accelerate
ACCELERATE = {PACKAGE / "training" / name for name in ("checkpointing.py", "run.py", "sharding.py")}
ACCELERATE.add(PACKAGE / "commands" / "processes.py")

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted([*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def part_of(module: Path) -> str:
    """First folder below the package, or the module's own name."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(module: Path) -> list[tuple[str, bool]]:
    """Absolute names of all imports of a file, each with whether it stands at module level."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    top_level = set(tree.body)
    package = ("maetok_hf", *module.relative_to(PACKAGE).parts[:-1]) if module.is_relative_to(PACKAGE) else ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top_level) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *filter(None, [node.module])))
            # `from . import x` names a module by its alias
            names = [name] if node.module else [f"{name}.{alias.name}" for alias in node.names]
            found += [(name, node in top_level) for name in names]
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_directions(module):
    part = part_of(module)
    for name, top_level in imports_of(module):
        first, *rest = name.split(".")
        if first == "maetok_hf":
            target = rest[0] if rest else "__init__"
            assert target == part or target in INNER[part], f"{part} must not import {name}"
        elif first == "accelerate":
            assert module in ACCELERATE, "accelerate belongs in what surrounds a run, and in the examples"
        elif first not in sys.stdlib_module_names:
            assert first in OUTER[part], f"{part} must not import {name}"
            lazy = first in LAZY and part != "conversion"  # which is about the Hub
            assert not (top_level and lazy), f"{name} must be imported where it is used"


def test_every_part_has_rules():
    parts = {part_of(module) for module in MODULES}
    assert parts == set(INNER) == set(OUTER)


@pytest.mark.parametrize("module", [*MODULES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_the_examples(module):
    assert not any(name.split(".")[0] == "examples" for name, _ in imports_of(module))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINE_CAP


def classes_and_functions(name_contains: str) -> list[str]:
    """Names of all classes and functions of the package whose name contains a word."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and name_contains in node.name.lower():
                found.append(node.name)
    return found


def test_there_is_one_block_and_one_attention():
    blocks = [name for name in classes_and_functions("block") if name[0].isupper()]
    attentions = [name for name in classes_and_functions("attention") if name[0].isupper()]
    assert [name for name in blocks if name.endswith("Block")] == ["TransformerBlock"]
    assert attentions == ["MAETokAttention"]


def test_there_is_one_place_for_crops():
    users = [m.name for m in MODULES if ".crop(" in m.read_text(encoding="utf-8")]
    assert users == ["transforms.py"]


def test_torch_load_is_never_given_code_to_run():
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                assert "weights_only=True" in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
