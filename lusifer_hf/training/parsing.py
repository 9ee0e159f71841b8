"""
From a YAML file and flags to dataclasses.

Everything is read as text first, because YAML makes a string of `1e-4` and a boolean of `no`: the type of a field
decides, by transformers' `HfArgumentParser`, in the file as on the command line.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


class Parser(HfArgumentParser):
    """Raises a `ValueError` where argparse would print how 150 flags are used."""

    def error(self, message):
        raise ValueError(message)


class _TextLoader(yaml.SafeLoader):
    """Leaves values as they are written, but for null; a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key!r} stands twice in the mapping{node.start_mark}.")
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, place: str) -> Any:
    """Texts, None, lists and mappings; raises a `ValueError` that begins with `place`."""
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from None


def read_flags(argv: Sequence[str], nested: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """The words before the first flag, and each flag's value as `read_yaml` has it; those of `nested` are YAML."""
    before: list[str] = []
    flags: dict[str, Any] = {}
    values = before
    for word in argv:
        if word.startswith("--"):
            name, is_given, value = word[2:].partition("=")
            values = flags[name.replace("-", "_")] = [value] if is_given else []
        else:
            values.append(word)
    for name, values in flags.items():
        if name in nested:
            flags[name] = read_yaml(" ".join(values), f"--{name}")
        elif len(values) < 2:  # a flag alone means true
            flags[name] = None if values == ["null"] else values[0] if values else "true"
    return before, flags


def refuse_unknown(given: Iterable[str], valid: Iterable[str], place: str = ""):
    """Raise a `ValueError` that names the nearest valid key."""
    valid = sorted(valid)
    for name in given:
        if name not in valid:
            nearest = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.0)
            raise ValueError(f"{place}there is no {name!r}. Did you mean {nearest[0]!r}?")


def parse(classes: Sequence[type], given: dict[str, Any]) -> tuple:
    """Dataclasses from texts; what flags cannot say (null, mappings) is handed to the parser as a default."""
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    tokens, defaults = [], {}
    for name, value in given.items():
        options = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        kinds = [get_origin(option) or option for option in options]
        if value is None:
            if NoneType not in kinds:
                raise ValueError(f"{name} cannot be null: leave it out to have its default.")
            defaults[name] = None
        elif isinstance(value, dict):
            if dict not in kinds:
                raise ValueError(f"{name} is not a mapping.")
            defaults[name] = value if dict[str, str] in options else _typed(value)
        elif isinstance(value, list):
            if list not in kinds:
                raise ValueError(f"{name} takes one value, not a list.")
            if str in kinds:  # either: the parser knows it as one text
                defaults[name] = value
            else:
                tokens += [f"--{name}", *map(str, value)]
        else:
            tokens.append(f"--{name}={value}")
    parser = Parser(classes, add_help=False)
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(tokens, look_for_args_file=False)


def parse_list(cls: type, entries: Any, key: str) -> list:
    """Dataclasses from the value of `key`, a list of mappings; each error names the entry."""
    if not isinstance(entries, list):
        raise ValueError(f"{key} must be a list of data sets, each with a path.")
    parsed = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("path"):
            raise ValueError(f"{key}[{index}] must be a data set with a path, not {entry!r}.")
        place = f"{key}[{index}] ({entry['path']}): "
        refuse_unknown(entry, [item.name for item in fields(cls)], place)
        required = [item.name for item in fields(cls) if item.default is MISSING]
        if missing := [name for name in required if entry.get(name) is None]:
            raise ValueError(f"{place}{', '.join(missing)} is missing.")
        try:
            parsed += parse([cls], entry)
        except ValueError as error:
            raise ValueError(f"{place}{error}") from None
    return parsed


def _typed(value: Any) -> Any:
    """Inside a mapping no field tells the type: numbers, true and false are what they look like."""
    if isinstance(value, dict):
        return {name: _typed(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_typed(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)
