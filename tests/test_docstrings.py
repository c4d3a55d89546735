"""Public docstrings describe the arguments that the signature really has."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import is_dataclass

import pytest

import maetok_hf


def public_objects() -> dict[str, object]:
    """Every public class, function and method defined in the package, by its dotted name."""
    found = {}
    for info in pkgutil.walk_packages(maetok_hf.__path__, "maetok_hf."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isclass(value):
                found[f"{info.name}.{name}"] = value
                for method_name, method in vars(value).items():
                    if inspect.isfunction(method) and (not method_name.startswith("_") or method_name == "__call__"):
                        found[f"{info.name}.{name}.{method_name}"] = method
            elif inspect.isfunction(value):
                found[f"{info.name}.{name}"] = value
    return found


PUBLIC = public_objects()


def described_arguments(docstring: str) -> list[str]:
    """Names in the `Args:` or `Parameters:` section, in order."""
    match = re.search(r"^( *)(?:Args|Parameters):\n(.*?)(?=^\1\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if match is None:
        return []
    indent = match.group(1) + "    "
    names = []
    for line in match.group(2).splitlines():
        entry = re.match(rf"{indent}(\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*)(?: \(|:)", line)
        if entry is not None and not line.startswith(indent + " "):
            names += [name.strip().lstrip("*") for name in entry.group(1).split(",")]
    return names


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_documented_arguments_are_those_of_the_signature(name):
    value = PUBLIC[name]
    # a dataclass takes its bases' fields as arguments, and their descriptions with them
    documented = [c for c in reversed(value.__mro__) if is_dataclass(c)] if is_dataclass(value) else [value]
    described = [
        argument for one in documented for argument in described_arguments(inspect.cleandoc(one.__doc__ or ""))
    ]
    if not described:
        return
    parameters = [p for p in inspect.signature(value).parameters if p != "self"]
    if inspect.isfunction(value):
        assert described == [p for p in parameters if p in described], "order"
    assert set(described) == set(parameters), "completeness"


@pytest.mark.parametrize("name", maetok_hf.__all__)
def test_every_name_of_the_package_has_a_docstring_with_its_errors(name):
    docstring = inspect.getdoc(getattr(maetok_hf, name))
    assert docstring
    assert described_arguments(docstring) or name == "FlowMatchHeunScheduler"
