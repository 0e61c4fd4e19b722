from maskcast import __version__
from maskcast.pipeline.cli.setup.doctor import examine, report


def test_the_report_has_a_line_for_each_part() -> None:
    lines = report().splitlines()
    assert len(lines) == len(examine())
    assert __version__ in lines[0]
    assert any(line.startswith("ok  openvino") and "fp32" in line for line in lines)
    assert any("h264" in line for line in lines)


def test_what_is_missing_comes_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr("maskcast.pipeline.cli.setup.doctor.find_spec", lambda name: None)
    missing = {finding.name: finding for finding in examine() if not finding.usable}
    assert "maskcast[builder]" in missing["builder"].detail
    assert "maskcast[rtx]" in missing["tensorrt_rtx"].detail
