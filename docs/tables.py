#!/usr/bin/env python
"""Write the tables of the documentation that are made from the code: recipes, and the map of the package.

    python docs/tables.py            # write them anew
    python docs/tables.py --check    # end with status 1 if one is out of date

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`, in a page beside this file.
"""

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path


DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGE = ROOT / "src" / "maetok_hf"
RECIPES = ROOT / "examples" / "recipes"
COSTS = ROOT / "benchmarks" / "results" / "training_cost.json"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table."""
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def comment_of(path: Path) -> dict[str, str]:
    """What the comment at the top of a recipe says: what is `Expected`, its `Cost`, and in a sentence `What` it is."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    head, _, rest = "\n".join(lines).partition("\n\n")
    found = dict(re.findall(r"^(Expected|Cost): (.*?)(?=^Cost:|\Z)", head, re.MULTILINE | re.DOTALL))
    text = " ".join(rest.split())
    found["What"] = re.split(r"(?<=[.:]) (?=[A-Z])", text)[0].removesuffix(":")
    if found.keys() != {"Expected", "Cost", "What"}:
        raise ValueError(f"{path} must begin with comments `Expected:`, `Cost:` and, after an empty one, what it is.")
    return {name: " ".join(words.split()).rstrip(".") for name, words in found.items()}


def recipe_rows(names: Sequence[str]) -> str:
    """A table of recipes, each with what its file says of it."""
    costs = json.loads(COSTS.read_text(encoding="utf-8"))["recipes"]
    rows = []
    for name in names:
        path = RECIPES / f"{name}.yaml"
        comment = comment_of(path)
        cost = comment["Cost"]
        if name in costs:  # the assumptions of these are stated above the table
            cost = re.sub(r"computed, not measured: (.*) at 40 %.*", r"\1 (computed)", cost)
        link = f"[{name}]({os.path.relpath(path, DOCS)})"
        rows.append([link, comment["What"], comment["Expected"], cost])
    return table(["recipe", "what", "expected", "cost"], rows)


def recipes(group: str) -> str:
    """The recipes of a group: `tokenizers`, `generators`, `small` or `ablations`."""
    names = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
    kinds = {name: kind_of(name) for name in names}
    return recipe_rows([name for name in names if kinds[name] == group])


def kind_of(name: str) -> str:
    """The group of a recipe."""
    if name.startswith("ablations/"):
        return "ablations"
    if name.startswith(("demo-", "study-")):
        return "small"
    return "tokenizers" if name.startswith("maetok-") else "generators"


def imports_of(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    inner = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [f"maetok_hf.{node.module or node.names[0].name}"]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "maetok_hf" and rest:
                inner.add(rest.split(".")[0])
    return inner


def parts() -> str:
    """The parts of the package: what each is for, and which others it imports."""
    rows = []
    for path in sorted(PACKAGE.iterdir()):
        root = path / "__init__.py" if path.is_dir() else path
        if path.stem.startswith("__") or root.suffix != ".py" or not root.is_file():
            continue
        docstring = ast.get_docstring(ast.parse(root.read_text(encoding="utf-8")))
        if not docstring:
            raise ValueError(f"{root} must say in a docstring what it is for.")
        what = " ".join(re.split(r"(?<=[.]) |\n\n", docstring)[0].split()).rstrip(".:")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        inner = sorted(set().union(*map(imports_of, files)) - {path.stem})
        rows.append([f"`{path.stem}`", what, ", ".join(inner)])
    return table(["part", "what it is for", "parts that it imports"], rows)


TABLES = {
    "tokenizers": lambda: recipes("tokenizers"),
    "generators": lambda: recipes("generators"),
    "small": lambda: recipes("small"),
    "ablations": lambda: recipes("ablations"),
    "parts": parts,
}


def renewed(text: str) -> str:
    """A page with its tables as they are now."""
    return TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing, and fail if a table is out of date.")
    check = parser.parse_args().check
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) == text:
            continue
        stale.append(page.name)
        if not check:
            temporary = page.with_name(f".{page.name}.partial")
            temporary.write_text(new, encoding="utf-8")
            os.replace(temporary, page)
    if check and stale:
        sys.exit(f"The tables of {', '.join(stale)} are out of date: run `python docs/tables.py`.")


if __name__ == "__main__":
    main()
