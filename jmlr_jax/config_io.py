"""Presets, dotted overrides and resolved files: every way a :class:`~jmlr_jax.config.Config` comes in or goes out.

A value takes the last of: the schema's default, the YAML preset, the overrides of the command line. Every problem is
reported with its place (``file:line`` or ``command line``), its dotted key, and what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jmlr_jax.config import Config
from jmlr_jax.config_tree import given, merge, nest, only_given
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import AnyPath, absolute, any_path, write_text

RESOLVED_NAME = "config.yaml"
"""Name of the record in a run directory: what `jmlr prepare` or `jmlr run` was asked, resolved."""

DEEPEST = 20  # of what stands within one another in YAML; the schema has five
_SEAL = "# sha256 of what follows: "

COMMAND_LINE = "command line"
EXPECTED = {  # in the reader's words, by pydantic's name of the error
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in YAML, put it in quotes)",
    "tuple_type": "a list, such as [a, b]",
    "model_type": "a section with keys of its own",
}


EXTENDS = "extends"  # the one key of a preset that is not the schema's


PATH_KEYS = (  # section, key, and values that are no path
    *(("data", f"{name}_path", ()) for name in ("train", "dev", "test", "corpus")),
    *((half, "source", ("scratch",)) for half in ("retriever", "generator")),
    *((half, "tokenizer", ("train",)) for half in ("retriever", "generator")),
)


class ConfigError(JmlrError):
    """A configuration that cannot be used: one line for each problem."""


class FieldRow(NamedTuple):
    """One configuration key as ``jmlr print-config --fields`` shows it."""

    key: str
    default: str
    description: str


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a preset, applies overrides and checks the result.

    Args:
        path: a YAML file, the bare name of a preset in ``configs/``, or None for the defaults.
        overrides: ``dotted.key=value`` strings, applied in order; values are YAML scalars or flow lists.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: no such file, not YAML, an unknown or repeated key, a value of the wrong type or out of range.
    """
    # Values are laid over the dumped defaults, not handed to pydantic as a partial tree: a section whose default
    # instance differs from its class (train.retriever) would otherwise lose what the preset leaves out.
    tree = Config().model_dump()
    places: dict[str, str] = {}
    asked: set[str] = set()
    if path is not None:
        for preset in _with_bases(path):
            found = _read_preset(preset, places)
            merge(tree, found)
            asked |= given(found, preset.name == RESOLVED_NAME)
    for override in overrides:
        key, value = _parse_override(override)
        places[key] = COMMAND_LINE
        asked.add(key)
        merge(tree, nest(key.split("."), value))
    problems = list(_boolean_problems(tree, Config, places))
    for half in ("retriever", "generator"):  # what nobody has set follows the half's source
        if isinstance(tree[half], dict):
            tree[half] = only_given(tree[half], asked, f"{half}.")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        # A cross-field check reports at its section; a wrong leaf below is the nearer cause and comes first.
        problems += [_describe(e, tree, places) for e in error.errors(include_url=False)]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def save_resolved(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes every value as YAML; :func:`load` reads the same configuration back. Atomic: whole or not at all.

    The first line holds a sum of the rest, so that what a disk has done to it is not taken for what was asked.
    """
    text = to_yaml(config)
    write_text(path, f"{_SEAL}{_sum(text)}\n{text}")


def with_absolute_paths(config: Config) -> Config:
    """The configuration with every path of data and models absolute, so that its record means the same anywhere."""
    tree = config.model_dump()
    for section, name, words in PATH_KEYS:
        value = tree[section][name]
        if value is not None and value not in words:
            tree[section][name] = absolute(value)
    return Config.model_validate(tree)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text, keys in the schema's order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def presets() -> dict[str, Path]:
    """Shipped presets by name: from ``configs/`` of the checkout, or of the installed package."""
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        found = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def field_rows() -> list[FieldRow]:
    """Every key with its default and description, in the schema's order; sections that are off show their own keys."""
    return list(_field_rows(Config, Config().model_dump(mode="json"), ""))


# Reading


def _find_preset(path: str) -> AnyPath:
    file = any_path(path)
    if file.is_dir():
        raise ConfigError(f"{path}: is a directory, expected a YAML file or the name of a preset")
    if file.exists():
        return file
    known = presets()
    if path in known:
        return any_path(known[path])
    close = difflib.get_close_matches(Path(path).stem, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{path}: no such file, and no preset of that name{hint} (presets: {', '.join(known) or 'none'})")


def _with_bases(path: str) -> list[AnyPath]:
    """The preset's file after those it extends: ``extends: NAME`` lays it over another preset."""
    files = [_find_preset(path)]
    while True:
        text = files[0].read_bytes().decode(errors="replace")  # what is not text is told when the file is read
        base = re.search(rf"^{EXTENDS}:[ \t]*([^\s#]+)", text, re.MULTILINE)
        if base is None:
            return files
        found = _find_preset(base[1])
        if found in files:
            raise ConfigError(f"{files[0]}: {EXTENDS}: {base[1]} extends this preset itself")
        files.insert(0, found)


def _read_preset(file: AnyPath, places: dict[str, str]) -> dict[str, Any]:
    """The file's tree; fills ``places`` with ``file:line`` for each dotted key in it."""
    try:
        text = file.read_text(encoding="utf-8")
        _check_seal(file, text)
        _check_events(file, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{file}:1: expected `key: value` lines, found something else")
        problems = list(_walk_nodes(node, Config, "", str(file), places))
        if problems:
            raise ConfigError("\n".join(problems))
        tree: dict[str, Any] = yaml.safe_load(text)
        tree.pop(EXTENDS, None)
        return tree
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{file}: not a YAML text file: {error}") from error


def _check_events(file: AnyPath | str, text: str) -> None:
    """Refuses what a few lines of YAML can cost: aliases, which can stand for gigabytes, and endless nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        place = f"{file}:{event.start_mark.line + 1}" if event.start_mark else str(file)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{place}: *{event.anchor}: aliases are not read here")
        if depth > DEEPEST:
            raise ConfigError(f"{place}: more than {DEEPEST} lists or sections within one another")


def _check_seal(file: AnyPath, text: str) -> None:
    """Refuses the record of a run directory that is not as it was written."""
    first, _, rest = text.partition("\n")
    sealed = first.startswith(_SEAL)
    if (sealed and first.removeprefix(_SEAL) != _sum(rest)) or (not text and file.name == RESOLVED_NAME):
        raise ConfigError(
            f"{file}: changed since it was written; bring it back from a copy"
            + (", or take its first line away to use it as it is now" if sealed else "")
        )


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _walk_nodes(
    node: yaml.MappingNode, model: type[BaseModel], prefix: str, file: str, places: dict[str, str]
) -> Iterator[str]:
    """Yields a problem for each unknown or repeated key; only descends into sections the schema has."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        key, place = f"{prefix}{name}", f"{file}:{line}"
        if name in seen:
            yield f"{place}: {key}: given twice, first in line {seen[name]}"
        seen[name] = line
        places[key] = place
        if key == EXTENDS:
            continue
        if name not in model.model_fields:
            yield _unknown(key, place)
            continue
        section = _section(model.model_fields[name])
        if section is not None and isinstance(value_node, yaml.MappingNode):
            yield from _walk_nodes(value_node, section, f"{key}.", file, places)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: {override!r}: expected key=value, for example train.steps=3")
    key = key.strip()
    field: FieldInfo | None = None
    model: type[BaseModel] | None = Config
    for part in key.split("."):
        field = model.model_fields.get(part) if model else None
        if field is None:
            raise ConfigError(_unknown(key, COMMAND_LINE))
        model = _section(field)
    assert field is not None
    if model is not None and text.strip() not in ("null", "{}"):  # null turns an optional section off, {} on
        example = f"{key}.{next(iter(model.model_fields))}=..."
        raise ConfigError(f"{COMMAND_LINE}: {key}: is a section; set its keys one by one ({example})")
    if text in ("", "null") and _accepts(field.annotation, type(None)):
        return key, None
    # Where text is wanted, it is taken as typed: 2024 is a name, "out #3" a folder, "{title}: {text}" a template.
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if _accepts(field.annotation, str) and not quoted:
        return key, text
    try:
        _check_events(f"{COMMAND_LINE}: {key}", text)
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{COMMAND_LINE}: {key}: {text!r} is not valid YAML") from error


# The schema


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section (optional ones too), else None."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _accepts(annotation: Any, kind: type) -> bool:
    """Whether a scalar of type ``kind`` can be meant: looks through unions, Annotated and Literal, not into tuples."""
    origin = get_origin(annotation)
    if origin is Literal:
        return any(type(value) is kind for value in get_args(annotation))
    if origin is tuple:
        return False
    return annotation is kind or any(_accepts(part, kind) for part in get_args(annotation))


def _field_rows(model: type[BaseModel], defaults: dict[str, Any] | None, prefix: str) -> Iterator[FieldRow]:
    for name, field in model.model_fields.items():
        key, section = f"{prefix}{name}", _section(field)
        if defaults is not None:
            default = defaults[name]
        else:
            default = field.get_default(call_default_factory=False)
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        shown = "required" if field.is_required() and defaults is None else _scalar(default)
        if section is None:
            yield FieldRow(key, shown, field.description or "")
            continue
        if default is None:
            yield FieldRow(key, "null", field.description or "off unless one of the keys below is given")
        yield from _field_rows(section, default, f"{key}.")


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").strip()


def _unknown(key: str, place: str) -> str:
    """Message for a key the schema lacks, naming the nearest: a sibling first, else the same word elsewhere."""
    known = {k.rsplit(".", cut)[0] if cut else k for k in (row.key for row in field_rows()) for cut in range(4)}
    prefix, _, last = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in sorted(known) if k.rpartition(".")[0] == prefix}
    close = difflib.get_close_matches(last, siblings, n=1)
    nearest = [siblings[close[0]]] if close else [k for k in sorted(known) if k.rpartition(".")[2] == last]
    nearest = nearest or difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {' or '.join(nearest[:3])}?" if nearest else "; see jmlr print-config --fields"
    return f"{place}: {key}: unknown key{hint}"


# Problems


def _boolean_problems(
    tree: dict[str, Any], model: type[BaseModel], places: dict[str, str], prefix: str = ""
) -> Iterator[str]:
    """YAML reads yes, on and true as booleans, and pydantic would read those as the number 1."""
    for name, value in tree.items():
        field, key = model.model_fields.get(name), f"{prefix}{name}"
        if field is None:  # pydantic reports it
            continue
        section = _section(field)
        if section is not None and isinstance(value, dict):
            yield from _boolean_problems(value, section, places, f"{key}.")
        elif isinstance(value, bool) and (_accepts(field.annotation, int) or _accepts(field.annotation, float)):
            yield f"{_place(key, places)}{key} = {value}: expected a number, not a yes or no"


def _describe(error: Any, tree: dict[str, Any], places: dict[str, str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    place = _place(key, places)
    if error["type"] == "value_error":  # a check across fields: its message names them
        return f"{place}{key}: {message}" if key else f"{place}{message}"
    if error["type"] == "missing":
        return f"{place}{key}: is required, and was not given"
    expected = EXPECTED.get(error["type"], message.removeprefix("Input should be "))
    return f"{place}{key} = {error['input']!r}: expected {expected}"


def _place(key: str, places: dict[str, str]) -> str:
    """``file:line: `` of the key, or of the nearest section around it that was given, or nothing."""
    while key:
        if key in places:
            return f"{places[key]}: "
        key = key.rpartition(".")[0]
    return ""
