from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.pretty import pprint

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Config, CurveConfig, SourceConfig, name_sources
from maskcast.pipeline.configuration.config_file import load_config, make_config, override

SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stream.yaml"
    path.write_text(text)
    return path


def test_a_file_with_one_source_has_defaults_for_the_rest(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "sources: [{url: a.mp4}]"))
    assert config == Config(sources=(SourceConfig(url="a.mp4"),))
    assert config.publish is not None
    assert config.publish.masks == "crop_u8"
    assert config.model.bundle == "default"


def test_publishing_can_be_switched_off(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "sources: [{url: a}]\npublish: null")).publish is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [{url: a}, {ulr: b}]", "unknown key 'ulr' in sources[1]; did you mean 'url'?"),
        ("sources: [{url: a}]\npublisher: {}", "unknown key 'publisher'; did you mean 'publish'?"),
        (
            "sources: [{url: a}]\nmodel: {zoo: 1}",
            "unknown key 'zoo' in model; known keys: bundle",
        ),
        ("sources: [{url: 5}]", "sources[0].url: expected text, got a whole number"),
        ("sources: [{name: x}]", "sources[0]: 'url' is missing"),
        ("sources: 4", "sources: expected a list, got a whole number"),
        ("sources: []", "no sources: give at least one"),
        ("model: {}", "no sources: give at least one"),
        ("", "expected keys such as `sources:`"),
        (
            "sources: [{url: a, policy: newest}]",
            "sources[0].policy: 'newest' is not a choice; use latest, block",
        ),
        ("sources: [{url: a, name: a/b}]", "sources[0].name: use 1 to 64 letters"),
        ("sources: [{url: a, name: x}, {url: b, name: x}]", "two sources are named 'x'"),
        ("sources: [{url: a}]\nmodel: {score_threshold: 2}", "model.score_threshold: expected a n"),
        (
            "sources: [{url: a}]\npublish: {jpeg_quality: 0}",
            "publish.jpeg_quality: expected a whol",
        ),
        (
            "sources: [{url: a}\nmodel: {",
            "not valid YAML, line 2, column 1: did not find expected ',' or ']'",
        ),
        (
            "sources:\n\t- a",
            "line 2, column 1: found character that cannot start any token; in",
        ),
        ("sources: [{url: *secret}]", "line 1, column 17: found undefined alias"),
        ("sources: [a]\nsources: [b]", "line 2: 'sources' is given twice"),
        ("sources: [{url: a, url: b}]", "line 1: 'url' is given twice"),
        ("sources: &all [*all]", "not valid YAML: an alias refers to itself"),
        (
            "sources: [{url: a}]\ntracing: {endpont: b}",
            "unknown key 'endpont' in tracing; did you mean 'endpoint'?",
        ),
    ],
)
def test_a_wrong_file_is_explained_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "$" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "sources:\n - rtsp://admin:secret@cam/1: x",
        "sources:\n - url: 'rtsp://admin:secret@cam/1\n",
        "sources: [{url: 'rtsp://admin:secret@cam/1', policy: 'rtsp://admin:secret@cam'}]",
    ],
)
def test_a_wrong_file_never_shows_a_password(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path, text))
    assert "secret" not in str(caught.value)


def test_no_view_of_a_configuration_shows_a_password() -> None:
    config = make_config({"sources": [{"url": "rtsp://admin:secret@cam/1"}]})
    console = Console(width=200)
    with console.capture() as captured:
        console.print(config)
        pprint(config, console=console)
    assert "cam" in captured.get()
    for view in (repr(config), str(config), f"{config.sources[0]}", captured.get()):
        assert "secret" not in view


def test_the_command_line_overrides_a_file() -> None:
    config = make_config({"sources": [{"url": "a"}], "model": {"engine": "openvino"}})
    changed = override(
        config,
        {
            "publish.endpoint": "tcp://*:6000",
            "model.score_threshold": 0.25,
            "model.bundle": None,
            "sources": [{"url": "b"}, {"url": "c"}],
        },
    )
    assert changed.publish is not None
    assert changed.publish.endpoint == "tcp://*:6000"
    assert changed.model.score_threshold == 0.25
    assert changed.model.engine == "openvino"
    assert changed.model.bundle == "default"
    assert [source.url for source in changed.sources] == ["b", "c"]
    assert config.sources[0].url == "a"


def test_a_file_without_sources_is_valid_with_sources_from_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "publish: {masks: polygon}")
    with pytest.raises(InputError, match="no sources"):
        load_config(path, {"sources": None, "control": None})
    config = load_config(path, {"sources": [{"url": "clip.mp4"}], "control": None})
    assert [source.url for source in config.sources] == ["clip.mp4"]
    assert config.publish is not None
    assert config.publish.masks == "polygon"


def test_a_wrong_mask_format_is_answered_with_the_formats(tmp_path: Path) -> None:
    path = written(tmp_path, "sources: [{url: a.mp4}]\npublish: {masks: polygons}")
    with pytest.raises(InputError, match="crop_u8, crop_bits, coco_rle, polygon, none"):
        load_config(path)


def test_an_override_can_bring_an_absent_section_back() -> None:
    config = make_config({"sources": [{"url": "a"}], "publish": None})
    changed = override(config, {"publish.masks": "polygon"})
    assert changed.publish is not None
    assert changed.publish.masks == "polygon"


@pytest.mark.parametrize("key", ["publish.endpont", "nothing", "model.engine.deep"])
def test_an_override_of_an_unknown_key_names_it(key: str) -> None:
    config = make_config({"sources": [{"url": "a"}]})
    with pytest.raises(InputError, match=key.split(".")[1 if "." in key else 0]):
        override(config, {key: "x"})


def test_sources_get_names_of_their_own() -> None:
    urls = ["rtsp://cam/", "http://cam/2", "x/cam.mp4", "clip.mp4"]
    sources = [SourceConfig(url=url) for url in urls]
    named = name_sources([*sources, SourceConfig(url="y", name="cam-2")])
    assert [source.name for source in named] == ["cam", "cam-3", "cam-4", "clip", "cam-2"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_example_loads(path: Path) -> None:
    assert load_config(path).sources


def test_examples_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"camera", "cameras", "file"}


def test_keys_are_configured_and_a_wrong_key_of_theirs_is_named() -> None:
    source = {"sources": [{"url": "a.mp4"}]}
    curve = {"secret_key": "server.key_secret", "allowed_clients": ["anna.key", "bert.key"]}
    config = make_config(source | {"publish": {"curve": curve}})
    assert config.publish is not None
    assert config.publish.curve == CurveConfig(
        secret_key="server.key_secret", allowed_clients=("anna.key", "bert.key")
    )
    changed = override(config, {"publish.curve.allowed_clients": "clients"})
    assert changed.publish is not None
    assert changed.publish.curve is not None
    assert changed.publish.curve.allowed_clients == "clients"
    with pytest.raises(InputError, match="secret_key"):
        make_config(source | {"publish": {"curve": {"allowed_clients": "clients"}}})
    with pytest.raises(InputError, match="did you mean 'allowed_clients'"):
        make_config(source | {"publish": {"curve": curve | {"allowed_client": "x"}}})


def test_sources_and_metrics_have_a_short_form(tmp_path: Path) -> None:
    short = load_config(written(tmp_path, "sources: [a.mp4]\nmetrics: 127.0.0.1:9100"))
    long = "sources: [{url: a.mp4}]\nmetrics: {address: 127.0.0.1:9100}"
    assert short == load_config(written(tmp_path, long))


def test_environment_variables_stand_for_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMERA_PASSWORD", "p:w")
    path = written(
        tmp_path, "sources: [{url: 'rtsp://me:${CAMERA_PASSWORD}@cam/1'}, {url: '$${x}'}]"
    )
    assert [source.url for source in load_config(path).sources] == ["rtsp://me:p:w@cam/1", "${x}"]


def test_an_environment_variable_that_is_not_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CAMERA", raising=False)
    with pytest.raises(
        InputError, match=r"sources\[0\].url: environment variable CAMERA is not set"
    ):
        load_config(written(tmp_path, "sources: [{url: '${CAMERA}'}]"))


@pytest.mark.parametrize(
    "sources", ["a.mp4", ["a.mp4"], [Path("a.mp4")], [{"url": "a.mp4"}], SourceConfig(url="a.mp4")]
)
def test_python_callers_may_give_sources_in_a_short_form(sources: Any) -> None:
    assert Config(sources=sources).sources == (SourceConfig(url="a.mp4"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": [5]}, r"sources\[0\]: expected a URL, a mapping or SourceConfig, not int"),
        ({"sources": 5}, "sources: expected a list of sources, not int"),
        ({"sources": ["a"], "model": "coco"}, "model: expected ModelConfig, not str"),
        ({"sources": ["a"], "publish": "tcp://*:1"}, "publish: expected PublishConfig, not str"),
    ],
)
def test_a_wrong_argument_in_python_is_named(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Config(**arguments)


def test_keys_name_the_other_side_the_subscribers_or_the_gateways() -> None:
    gateways = ["tcp://gateway-a:5556", "tcp://gateway-b:5556"]
    source = {"sources": [{"url": "test://64x48@10"}]}
    keys = {"secret_key": "worker.key_secret", "gateway_key": "gateway.key"}
    config = make_config(source | {"publish": {"gateways": gateways, "curve": keys}})
    assert config.publish is not None
    assert config.publish.gateways == tuple(gateways)
    assert config.publish.curve is not None
    assert config.publish.curve.gateway_key == "gateway.key"
    secret = {"secret_key": "worker.key_secret"}
    with pytest.raises(InputError, match="gateway_key: missing"):
        make_config(source | {"publish": {"gateways": gateways, "curve": secret}})
    with pytest.raises(InputError, match="allowed_clients: missing"):
        make_config(source | {"publish": {"curve": secret}})
