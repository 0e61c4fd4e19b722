"""``maskcast config``: every key of a configuration file, an example, and a check."""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from maskcast.engines.bundle import open_bundle
from maskcast.pipeline.configuration.config import Config, name_sources
from maskcast.pipeline.configuration.config_file import alternatives, load_config
from maskcast.pipeline.url import redact
from maskcast.pipeline.validation import check_config

EXAMPLES = {
    "url": "rtsp://192.168.1.20/stream1",
    "secret_key": "server.key_secret",
    "allowed_clients": "clients/",
}
"""Values for required keys, which have no default."""

_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false"}


class Key(NamedTuple):
    """One key of a configuration.

    Attributes:
        section: the section's path, "" for the top, "sources[]" for each source.
        name: the key.
        kind: the type of its value, in words.
        default: its default as YAML; None if it is required.
        text: what it does.
        struct: the type of the section below this key, if it is one.
        is_list: whether the key takes a list of sections.
    """

    section: str
    name: str
    kind: str
    default: str | None
    text: str
    struct: type[msgspec.Struct] | None
    is_list: bool


def keys(kind: type[msgspec.Struct] = Config, section: str = "") -> Iterator[Key]:
    """Yield every key, sections before the keys in them."""
    hints, texts = get_type_hints(kind, include_extras=True), _attributes(kind)
    for field in msgspec.structs.fields(kind):
        structs = [
            part for part in alternatives(hints[field.name]) if hasattr(part, "__struct_fields__")
        ]
        is_list = bool(structs) and _is_list(hints[field.name])
        yield Key(
            section,
            field.encode_name,
            _describe(hints[field.name]),
            None if field.required else _default(field),
            texts.get(field.name, ""),
            structs[0] if structs else None,
            is_list,
        )
        if structs:
            path = f"{section}.{field.encode_name}".lstrip(".") + "[]" * is_list
            yield from keys(structs[0], path)


def example() -> str:
    """Return a configuration file with every key, its default and what it does."""
    lines = [
        "# Every key of a configuration with its default. Keep what you change.",
        "# ${NAME} stands for the environment variable NAME.",
    ]
    every = list(keys())
    for key in every:
        path = f"{key.section}.{key.name}".lstrip(".")
        indent = "  " * (path.count(".") + path.count("[]"))
        lines += [f"{indent}# {line}" for line in _wrap(key.text, 96 - len(indent))]
        value = EXAMPLES.get(key.name, "") if key.default in (None, "null") else key.default
        if key.struct is not None:
            value = ""
        first = key.section.endswith("[]") and key.default is None
        line = f"{indent[2:] + '- ' if first else indent}{key.name}: {value}".rstrip()
        lines.append(line if _is_active(key, every) else f"# {line}")
    return "\n".join(lines) + "\n"


def _is_active(key: Key, every: list[Key]) -> bool:
    """Tell whether a key is active in the example; it is commented out if it is unset by default.

    So is a key whose section is unset, and a section whose keys are all unset.
    """
    path = f"{key.section}.{key.name}".lstrip(".")
    for other in every:
        other_path = f"{other.section}.{other.name}".lstrip(".")
        if _is_unset(other) and path.startswith((f"{other_path}.", f"{other_path}[]")):
            return False
    if key.struct is None:
        return not _is_unset(key)
    below = f"{path}[]" if key.is_list else path
    return not _is_unset(key) and any(
        _is_active(other, every) for other in every if other.section == below
    )


def _is_unset(key: Key) -> bool:
    """Tell whether a key is unset by default. ``sources`` is not, because it needs a value."""
    return key.default == "null" or (key.default == "[]" and key.name != "sources")


def check(path: Path) -> str:
    """Read a configuration, check it as a run does, and return a summary of one line.

    Raises:
        InputError: it cannot be read, a key is wrong, there is no such bundle, or the configuration
            is invalid (see ``check_config``).
    """
    config = load_config(path)
    if config.cluster is not None:
        from maskcast.pipeline.cluster.fleet import check_fleet

        cluster, _ = check_fleet(config)
        published = f"publishes to {cluster.gateway}"
    else:
        check_config(config, open_bundle(config.model.bundle).manifest)
        published = "publishes nothing"
        if config.publish is not None:
            endpoints = ", ".join(config.publish.gateways) or config.publish.endpoint
            published = f"publishes to {endpoints}"
    sources = ", ".join(f"{s.name} ({redact(s.url)})" for s in name_sources(config.sources))
    return f"{path}: valid; {published}; sources: {sources or 'none'}"


def _attributes(kind: type) -> dict[str, str]:
    """Read the "Attributes:" part of a docstring."""
    _, _, part = (kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", part, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in found}


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    return origin in (tuple, list) or any(_is_list(argument) for argument in get_args(hint))


def _describe(hint: Any) -> str:
    """Describe the values that a key accepts."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(arguments[0]) + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        kinds = [_describe(a) for a in arguments if a is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        inner = [a for a in arguments if a is not Ellipsis]
        return f"list of {_describe(inner[0])}"
    if hasattr(hint, "__struct_fields__"):
        return "section"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _bounds(metas: tuple[Any, ...]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(meta, name):g}"
        for meta in metas
        for name, sign in signs.items()
        if getattr(meta, name, None) is not None
    ]
    return f" ({', '.join(limits)})" if limits else ""


def _default(field: Any) -> str:
    value = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "{}"
    text = msgspec.yaml.encode(value).decode().strip()
    return text.removesuffix("...").strip()


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text[:1].upper() + text[1:], width)
