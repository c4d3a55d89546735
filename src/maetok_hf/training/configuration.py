"""From a YAML file and command-line flags to a checked dataclass.

Every setting of a run is a field of a dataclass: its default is the field's, its flag and its help come from the
field's annotation and docstring entry, and a file may set nothing that is not a field. One spelling therefore exists
for each setting, and none can be accepted and then ignored.
"""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml


T = TypeVar("T")


def closest(name: str, known: typing.Iterable[str]) -> str:
    """A hint such as `"; did you mean 'seed'?"` for a misspelt name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def field_types(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_help(cls: type) -> dict[str, str]:
    """
    The description of every field, read from the `Args:` section of the class docstring (and of its bases).

    Raises:
        ValueError: If a field is not described.
    """
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, arguments = text.partition("\nArgs:\n")
        arguments = re.split(r"\n(?=\S)", arguments)[0]  # up to the next section
        for entry in re.split(r"^ {4}(?=\w)", arguments, flags=re.MULTILINE)[1:]:
            name, description = re.match(r"(\w+) \([^\n]*?\):(.*)", entry, re.DOTALL).groups()
            descriptions[name] = " ".join(description.split())
    undescribed = [field.name for field in dataclasses.fields(cls) if field.name not in descriptions]
    if undescribed:
        raise ValueError(f"{cls.__name__} has fields that its docstring does not describe: {undescribed}.")
    return descriptions


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """
    Check one value against a field's annotation.

    Args:
        name (`str`): Name of the setting, for the message.
        value (`Any`): The value as read from YAML or given in Python. An integer is accepted where a float is wanted,
            and so is text that reads as a number: YAML takes `1e-4` (without a dot) for text.
        annotation (`Any`): `int`, `float`, `bool`, `str`, `dict`, a `Literal`, `list[...]`, or a union of these with
            `None`.

    Returns:
        `Any`: The value in the annotated type.

    Raises:
        ValueError: If the value has another type or is not among the choices.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        members = [member for member in arguments if member is not type(None)]
        for member in members:
            try:
                return check_value(name, value, member)
            except ValueError:
                if member is members[-1]:
                    raise
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"`{name}` must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"`{name}` must be a list, got {value!r}.")
        return [check_value(name, item, arguments[0]) for item in value]
    if annotation is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"`{name}` must be a number, got {value!r}.") from None
    expected = dict if origin is dict else annotation
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"`{name}` must be of type `{expected.__name__}`, got {value!r} of `{type(value).__name__}`.")
    return value


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """
    Make a dataclass from named values.

    Args:
        cls (`type`): The dataclass.
        values (`Mapping[str, Any]`): Values of some or all of its fields.

    Returns:
        The instance; its `__post_init__` checks the ranges and the combinations.

    Raises:
        ValueError: If a name is not a field (the message names the closest one), if a value has the wrong type, or if
            a field without default is missing.
    """
    annotations = field_types(cls)
    for name in values:
        if name not in annotations:
            raise ValueError(f"Unknown setting {name!r} for {cls.__name__}{closest(str(name), annotations)}")
    checked = {name: check_value(name, value, annotations[name]) for name, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in checked
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{cls.__name__} needs a value for {', '.join(map(repr, missing))}.")
    return cls(**checked)


def refuse_effectless(options: Any, names: typing.Iterable[str], where: str) -> None:
    """
    Refuse settings that are given and would be ignored.

    Args:
        options (`Any`): A dataclass.
        names (`Iterable[str]`): Fields that nothing reads.
        where (`str`): When that is so, for the message.

    Raises:
        ValueError: If one of them has another value than its default.
    """
    names = set(names)
    for field in dataclasses.fields(options):
        if field.name not in names:
            continue
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if getattr(options, field.name) != default:
            raise ValueError(f"`{field.name}` = {getattr(options, field.name)!r} has no effect {where}: remove it.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """
    Read the settings in a YAML file.

    Raises:
        ValueError: If the file does not exist, is not valid YAML, is not a mapping, or names a key twice.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [file.stem for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"There is no recipe file {str(path)!r}{closest(path.stem, siblings)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {values!r}.")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's last-one-wins rule for repeated keys would silently ignore the first value."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def add_flags(
    parser: Any, cls: type, title: str, defaults: bool = False, positional: typing.Collection[str] = ()
) -> None:
    """
    Add one flag for every field of a dataclass to an argument parser.

    A flag that is not given is absent from the parsed namespace, so [`given_flags`] returns exactly what was typed.
    Booleans are `--name`, `--name true` or `--name false`; lists take any number of words; dictionaries take
    `KEY=VALUE` words.

    Args:
        parser (`argparse.ArgumentParser`): The parser, made with `argument_default=argparse.SUPPRESS` and
            `allow_abbrev=False`.
        cls (`type`): The dataclass.
        title (`str`): Heading in the help text.
        defaults (`bool`, *optional*, defaults to `False`): Whether the help names defaults: not where a file, such as
            a recipe, gives other values.
        positional (`Collection[str]`, *optional*): Fields that are words by their place instead of flags.

    Raises:
        ValueError: If the parser has another default, which would pass for a typed value, or accepts abbreviations.
    """
    if parser.argument_default is None or parser.allow_abbrev:
        raise ValueError("`parser` needs `argument_default=argparse.SUPPRESS` and `allow_abbrev=False`.")
    group = parser.add_argument_group(title)
    helps = field_help(cls)
    for field in dataclasses.fields(cls):
        default = _default_text(field) if defaults else ""
        annotation = field_types(cls)[field.name]
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        if typing.get_origin(annotation) in (types.UnionType, typing.Union):
            annotation = members[0]
        keywords: dict[str, Any] = {"help": f"{helps[field.name]}{default}".replace("%", "%%")}
        origin = typing.get_origin(annotation)
        if origin is typing.Literal:
            keywords |= {"choices": typing.get_args(annotation)}
        elif annotation is bool:
            keywords |= {"type": _parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
        elif origin is list:
            (element,) = typing.get_args(annotation)
            choices = typing.get_args(element)  # of a Literal
            keywords |= {"type": str, "choices": choices} if choices else {"type": element}
            keywords |= {"nargs": "*", "metavar": f"{{{','.join(choices)}}}" if choices else field.name.upper()}
        elif dict in (annotation, origin):
            keywords |= {"nargs": "+", "metavar": "KEY=VALUE"}
        else:
            keywords |= {"type": annotation, "metavar": annotation.__name__.upper()}
        if field.name in positional:
            group.add_argument(field.name, **(keywords | {"metavar": field.name.upper()}))
        else:
            group.add_argument(f"--{field.name}", **keywords)


def _default_text(field: dataclasses.Field) -> str:
    """What the help of a flag says of its default, for those that have one of their own."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
        return f" Default: {' '.join(map(str, default))}." if isinstance(default, list) and default else ""
    if field.default is dataclasses.MISSING:
        return " Required."
    return "" if field.default is None else f" Default: {field.default}."


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def given_flags(arguments: Any, cls: type) -> dict[str, Any]:
    """
    The flags that were typed, for one dataclass.

    Args:
        arguments (`argparse.Namespace`): Result of a parser with the flags of [`add_flags`].
        cls (`type`): The dataclass.

    Returns:
        `dict`: Values by field name.

    Raises:
        ValueError: If a word of a dictionary flag is not `KEY=VALUE`.
    """
    given = {name: value for name, value in vars(arguments).items() if name in field_types(cls)}
    for name, value in given.items():
        annotation = field_types(cls)[name]
        if dict in (annotation, typing.get_origin(annotation)):
            given[name] = _parse_pairs(name, value)
    return given


def _parse_pairs(name: str, words: list[str]) -> dict[str, Any]:
    pairs = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not (key and separator):
            raise ValueError(f"`--{name}` takes KEY=VALUE words, got {word!r}.")
        pairs[key] = yaml.safe_load(text)
    return pairs
