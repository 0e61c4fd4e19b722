"""Reads configurations from YAML, with environment variables, and explains errors by key."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import (
    ClusterConfig,
    Config,
    ControlConfig,
    CurveConfig,
    MetricsConfig,
    ModelConfig,
    OutputConfig,
    PublishConfig,
    SourceConfig,
    TracingConfig,
)
from maskcast.pipeline.configuration.zones import LineConfig, ZoneConfig
from maskcast.pipeline.url import redact

T = TypeVar("T")

_SHORT_FORMS = {"metrics": "address", "control": "endpoint"}
"""Sections that may be given as a text, and the key that the text is the value of."""

_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "sources": SourceConfig,
    "sources.zones": ZoneConfig,
    "sources.lines": LineConfig,
    "model": ModelConfig,
    "publish": PublishConfig,
    "publish.curve": CurveConfig,
    "outputs": OutputConfig,
    "metrics": MetricsConfig,
    "tracing": TracingConfig,
    "control": ControlConfig,
    "cluster": ClusterConfig,
}


def load_config(path: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file.

    Args:
        path: the file.
        changes: values by dotted key that replace those of the file, as in ``override``.

    Raises:
        InputError: the file is missing or not YAML, or a key in it is unknown or has a wrong value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the configuration {path}: {reason}") from None
    try:
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
        raw = msgspec.yaml.decode(text)
        _reject_repeated_keys(path, root)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}: not valid YAML{_yaml_problem(error, text)}") from None
    except (yaml.YAMLError, msgspec.DecodeError):
        raise InputError(f"{path}: not valid YAML") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: an alias refers to itself; remove it") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected keys such as `sources:`; see maskcast config example")
    try:
        return make_config(_change(_expand(raw), changes or {}))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _reject_repeated_keys(path: str | Path, node: Any) -> None:
    """Reject a key with several values, of which YAML would silently take the last.

    Raises:
        InputError: a mapping has a key twice.
    """
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if key.value in names:
                line = key.start_mark.line + 1
                raise InputError(f"{path}: line {line}: {key.value!r} is given twice; remove one")
            names.add(str(key.value))
            _reject_repeated_keys(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _reject_repeated_keys(path, item)


def _expand(value: Any, key_path: str = "") -> Any:
    """Replace ``${NAME}`` in texts with the environment variable; ``$${`` is a literal ``${``.

    Raises:
        InputError: the variable is not set.
    """
    if isinstance(value, dict):
        return {key: _expand(item, f"{key_path}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, f"{key_path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        if match[1] not in os.environ:
            raise InputError(f"{key_path}: environment variable {match[1]} is not set; export it")
        return os.environ[match[1]]

    return re.sub(r"\$?\$\{([A-Za-z_][A-Za-z0-9_]*)\}", variable, value)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a configuration with some keys changed, as the command line does.

    Args:
        config: the configuration to change.
        changes: new values by dotted key, ``{"publish.endpoint": "tcp://*:6000"}``. None changes
            nothing. An absent section is created with its defaults.

    Raises:
        InputError: a key is unknown or a value is wrong; the message names the key.
    """
    return make_config(_change(msgspec.to_builtins(config), changes))


def _change(raw: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plain values with the changes applied."""
    changed = copy.deepcopy(raw)
    for key, value in changes.items():
        if value is None:
            continue
        *sections, last = key.split(".")
        target = changed
        for section in sections:
            if section in _SHORT_FORMS and isinstance(target.get(section), str):
                target[section] = {_SHORT_FORMS[section]: target[section]}
            elif not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        if isinstance(target.get(last), dict) and last in _SHORT_FORMS:
            target[last] = target[last] | {_SHORT_FORMS[last]: value}
        else:
            target[last] = value
    return changed


def make_config(raw: Mapping[str, Any]) -> Config:
    """Make a configuration from plain mappings and sequences, with the checks of a file.

    Raises:
        InputError: a key is unknown or a value is wrong; the message names the key.
    """
    raw = dict(raw)
    if isinstance(raw.get("sources"), list | tuple):
        raw["sources"] = [{"url": s} if isinstance(s, str) else s for s in raw["sources"]]
    if isinstance(raw.get("metrics"), str):
        raw["metrics"] = {"address": raw["metrics"]}
    return _convert(raw, Config)


def make_source(raw: Mapping[str, Any]) -> SourceConfig:
    """Make one source's configuration from a plain mapping, with the checks of a file.

    Raises:
        InputError: a key is unknown or a value is wrong; the message names the key.
    """
    return _convert(raw, SourceConfig, "sources")


def _convert(raw: Mapping[str, Any], kind: type[T], section: str = "") -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise InputError(_explain(str(error), section)) from None


def _explain(problem: str, section: str = "") -> str:
    """Turn msgspec's message ("… - at `$.sources[0].url`") into one that names the key first."""
    text, _, key_path = problem.partition(" - at `$")
    key = key_path.rstrip("`").removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL):
        within = re.sub(r"\[\d+\]", "", ".".join(filter(None, (section, key))))
        known = _SECTIONS.get(within, Config).__struct_fields__
        near = difflib.get_close_matches(unknown[1], known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        where = f" in {key}" if key else ""
        return redact(f"unknown key {unknown[1]!r}{where}; {advice}")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", text):
        return f"{key}: {missing[1]!r} is missing" if key else f"{missing[1]!r} is missing"
    if (wrong := re.fullmatch(r"Invalid enum value (.*)", text)) and (choices := _choices(key)):
        return redact(f"{key}: {wrong[1]} is not a choice; use {', '.join(choices)}")
    if key.endswith("name") and "regex" in text:
        text = "use 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first"
    text = re.sub(r"`([a-z]+)(?: \| [a-z]+)*`", lambda m: _PLAIN_TYPES.get(m[1], m[0]), text)
    return redact(f"{key}: {text[:1].lower()}{text[1:]}" if key else text)


_PLAIN_TYPES = {
    "object": "a section of keys",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}


def _choices(key: str) -> tuple[str, ...]:
    """Return the values that a key accepts; empty if they are not a fixed set."""
    hint: Any = Config
    for part in re.sub(r"\[\d+\]", "", key).split("."):
        kinds = [kind for kind in alternatives(hint) if hasattr(kind, "__struct_fields__")]
        if not kinds:
            return ()
        hint = get_type_hints(kinds[0]).get(part)
    return tuple(value for value in alternatives(hint) if isinstance(value, str))


def alternatives(hint: Any) -> list[Any]:
    """Return the parts of a union, a literal or a tuple, or the type itself."""
    if get_origin(hint) is None:
        return [hint]
    return [alternative for part in get_args(hint) for alternative in alternatives(part)]


def _yaml_problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Describe where YAML is invalid and why, without quoting the file: it may contain secrets."""
    mark = error.problem_mark
    if mark is None:
        return ""
    lines = text.splitlines()
    has_tab = mark.line < len(lines) and "\t" in lines[mark.line]
    advice = "; indent with spaces, not with tabs" if has_tab else ""
    return f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}{advice}"
