"""The documents: their links, commands, keys, metrics, events and Python examples."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import maskcast
from maskcast.engines import load as load_module
from maskcast.pipeline.cli.setup.configuration import keys
from maskcast.pipeline.cluster.cluster_metrics import make_cluster_registry
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.cluster.metrics import make_gateway_registry
from maskcast.pipeline.configuration.config_file import make_config
from maskcast.pipeline.control.messages import ClusterReport, GatewayReport, SourceReport
from maskcast.pipeline.monitor.metrics import make_registry
from maskcast.pipeline.stats import Meter
from maskcast.pipeline.wire.rights import make_rights

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "benchmarks" / "README.md"])
PACKAGES = ("pipeline", "engines", "builder")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in a language; "" for those without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


# ---- Links and generated pages


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pages
def test_every_path_and_test_that_is_named_exists(page: Path) -> None:
    for path, _, test in re.findall(
        r"`((?:pipeline|engines|builder|configs|tests|benchmarks|docs)/[\w./@-]+)(::(\w+))?`",
        prose(page),
    ):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{page.name}: {test}"


def test_generated_pages_are_up_to_date() -> None:
    for name, text in generate().pages().items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is out of date: run make docs"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert (DOCS / "demo.webp").stat().st_size < 1_500_000


# ---- Commands


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every command line in code blocks and, in backquotes, in the text."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:maskcast|make|python -m benchmarks)[ .][^`]*)`", prose(page))
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        if words:
            yield words


@functools.cache
def known_commands() -> dict[str, Any]:
    return dict(generate().commands())


def options_of(command: Any) -> set[str]:
    options = {"-h", "--help"}
    for option in generate().parameters(command, "option"):
        options.update((*option.opts, *option.secondary_opts))
    return options


def check_command(words: list[str]) -> str:
    """Return what is wrong with a ``maskcast`` command line; "" if nothing is."""
    rest, name, allowed = words[1:], "maskcast", {"--version", "--help", "--install-completion"}
    for word in rest:
        if f"{name} {word}" in known_commands():
            name = f"{name} {word}"
            allowed |= options_of(known_commands()[name])
        elif name == "maskcast" and not word.startswith("-") and word.islower():
            return f"unknown command {word!r}"
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if option.startswith("--") and option not in allowed:
            return f"unknown option {option} of {name}"
    return ""


@pages
def test_every_command_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in shell_lines(page):
        line = " ".join(words)
        if words[0] == "maskcast":
            problem = check_command(words)
            assert not problem, f"{page.name}: {line}: {problem}"
        elif words[0] == "make" and len(words) > 1:
            assert f"\n{words[1]}:" in makefile, f"{page.name}: {line}"
        elif words[:2] == ["python", "-m"]:
            module = words[2].replace(".", "/")
            found = [(ROOT / f"{module}{end}").exists() for end in (".py", "/__init__.py")]
            assert any(found) or module in ("maskcast", "venv", "pip"), f"{page.name}: {line}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("maskcast runn clip.mp4", "unknown command 'runn'"),
        ("maskcast run clip.mp4 --sav a.mp4", "unknown option --sav of maskcast run"),
        ("maskcast ctl ENDPOINT add yard URL --max-fps 5", ""),
        ("maskcast ctl ENDPOINT list --max-fps 5", "unknown option --max-fps of maskcast ctl list"),
    ],
)
def test_wrong_commands_are_found(line: str, problem: str) -> None:
    assert check_command(line.split()) == problem


# ---- Configuration


def examples() -> Iterator[tuple[str, Any]]:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            yield page.name, yaml.safe_load(block)


def whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Complete a part of a configuration: sections, or keys of a source."""
    if raw.keys() <= set(maskcast.SourceConfig.__struct_fields__):
        return {"sources": [{"url": "a.mp4", **raw}]}
    return {"sources": ["a.mp4"], **raw}


def test_every_configuration_in_the_documents_is_valid() -> None:
    count = 0
    for page, raw in examples():
        try:
            if isinstance(raw.get("control"), bool):  # a rights file
                make_rights(raw["sources"], control=raw["control"])
            else:
                make_config(whole(raw))
        except maskcast.InputError as error:
            raise AssertionError(f"{page}: {error}") from None
        count += 1
    assert count >= 2


def test_every_key_in_the_text_exists() -> None:
    known = {f"{key.section}.{key.name}".lstrip(".").replace("[]", "") for key in keys()}
    sections = {"model", "publish", "outputs", "metrics", "control", "cluster"}
    for page in PAGES:
        for name in re.findall(r"`([a-z]+\.[a-z_.]+)`", prose(page)):
            if name.split(".")[0] in sections and not name.endswith((".py", ".md", ".prom")):
                assert name in known, f"{page.name}: {name}"


# ---- Operations and architecture


class EmptyCluster:
    """A cluster without nodes and sources, whose gateway is down."""

    gateway_stats = None

    def reports(self) -> list[SourceReport]:
        return []

    def metrics(self) -> list[Any]:
        return []

    def cluster(self) -> ClusterReport:
        return ClusterReport([], GatewayReport("", None, 0, 0, 0, 0))


def test_every_metric_is_documented_and_no_other(timed_engine: Any) -> None:
    gateway = Gateway("tcp://127.0.0.1:0", "tcp://127.0.0.1:0")
    registries = [
        make_registry(Meter(["cam"]).stats, timed_engine()),
        make_gateway_registry(gateway.stats),
        make_cluster_registry(EmptyCluster()),
    ]
    served = set()
    for registry in registries:
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            if family.name.startswith("maskcast_"):
                ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
                served.add(family.name + ending)
    documented = re.findall(r"^\| `(maskcast_\w+)`", (DOCS / "operations.md").read_text(), re.M)
    assert sorted(documented) == sorted(served)


def test_every_log_event_is_documented_and_no_other() -> None:
    call = re.compile(r'_?logger\.(?:info|warning|error)\(\s*"([a-z]+(?:_[a-z]+)+)"')
    logged = {
        event
        for folder in PACKAGES
        for file in (ROOT / folder).rglob("*.py")
        for event in call.findall(file.read_text())
        if file.name != "log.py"
    }
    _, _, text = (DOCS / "operations.md").read_text().partition("## Log")
    documented = re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE)
    assert sorted(documented) == sorted(logged)


@functools.cache
def threads() -> set[tuple[str, Path]]:
    """Return the names of all threads, with the files that start them."""
    found = set()
    for file in (file for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")):
        if "daemon=" not in (text := file.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            name = given.get("name")
            if "daemon" in given and isinstance(name, ast.Constant):
                found.add((str(name.value), file))
            elif "daemon" in given and isinstance(name, ast.JoinedStr):
                first = name.values[0]
                assert isinstance(first, ast.Constant)
                found.add((f"{first.value}NAME", file))
    return found


def thread_names(*without: str) -> set[str]:
    """Return the names of all threads, except those in some folders."""
    of_stages = {"preprocess", "infer", "masks", "publish", "record"}
    return of_stages | {name for name, file in threads() if not {*without} & {*file.parts}}


def test_the_table_of_threads_names_those_that_exist() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| `(\w+)` in `([\w/.]+)` \|", (DOCS / "architecture.md").read_text(), re.M
    )
    assert {thread for thread, _, _ in rows} <= thread_names("cli")
    assert {thread for thread, _, _ in rows} >= thread_names("cli", "clients")
    for _, owner, file in rows:
        assert re.search(rf"^class {owner}\b", (ROOT / file).read_text(), re.MULTILINE), owner


# ---- Python


def python_blocks() -> list[Any]:
    return [
        pytest.param(code, id=f"{page.stem}-{number}")
        for page in (ROOT / "README.md", DOCS / "python.md")
        for number, code in enumerate(blocks(page, "python"))
    ]


@pytest.mark.parametrize("code", python_blocks())
def test_every_python_example_runs(
    code: str,
    tmp_path: Path,
    make_clip: Any,
    timed_engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    clip = make_clip("clip.mp4", frames=5, width=96, height=64)
    Image.new("RGB", (96, 64)).save("photo.jpg")
    endpoint = f"ipc://{tmp_path}/s"
    code = code.replace("tcp://127.0.0.1:5555", endpoint)
    names = {"__name__": "__main__"}
    if "subscribe(" in code:
        source = {"url": str(clip), "name": "door"}
        publish = maskcast.PublishConfig(endpoint=endpoint, wait_subscribers=1)
        config = maskcast.Config(sources=[source], publish=publish)
        pipeline = maskcast.Pipeline(config, timed_engine())
        pipeline.start()
        exec(compile(code, request.node.name, "exec"), names)
        pipeline.join()
    else:

        def load(*_: Any, pose: bool = False, **__: Any) -> Any:
            return timed_engine(pose_s=0.0 if pose else None)

        # Loading the real model takes seconds; tests of the command and of `predict` do so.
        # The name of the package comes first: it is looked up in its module when it is first used.
        for name in (
            "load_engine",
            "engines.load.load_engine",
            "pipeline.pipeline.load_engine_for",
        ):
            monkeypatch.setattr(f"maskcast.{name}", load)
        monkeypatch.setattr(load_module, "_kept_engine", load_module._KeptEngine())
        exec(compile(code, request.node.name, "exec"), names)


def test_every_public_name_is_in_the_python_page() -> None:
    text = (DOCS / "python.md").read_text().partition("## All names")[2]
    assert sorted(re.findall(r"`(\w+)`", text)) == sorted(maskcast.__all__)


# ---- Language

AVOIDED = r"whoever|so many|so long|shall|told|beside|anew|epitaph"


@pages
def test_no_page_has_words_that_the_project_avoids(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", prose(page))
    assert not re.findall(rf"\b({AVOIDED}|pictures?)\b", text, re.IGNORECASE), page.name


@pytest.mark.parametrize("folder", [*PACKAGES, "configs"])
def test_no_text_of_the_code_has_words_that_the_project_avoids(folder: str) -> None:
    files = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.y*ml")]
    assert files or folder == "configs"
    for file in files:
        found = re.findall(rf"\b(?:{AVOIDED})\b", file.read_text(), re.IGNORECASE)
        assert not found, f"{file.relative_to(ROOT)}: {found}"
