import json
from pathlib import Path

from maskcast.builder.training.log import TrainingLog

SCORES = {"bbox": {"AP": 0.2, "AP50": 0.4}, "images": 3}


def test_entries_are_lines_of_json(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.append({"iteration": 20, "losses": {"mask": 0.5}})
    log.append({"iteration": 40, "scores": SCORES})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [20, 40]


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for iteration in (20, 40, 60):
        log.append({"iteration": iteration, "losses": {"mask": 0.5}})
    resumed = TrainingLog(tmp_path, 40)
    resumed.append({"iteration": 60, "losses": {"mask": 0.4}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [20, 40, 60]
    assert json.loads(lines[-1])["losses"] == {"mask": 0.4}


def test_a_resumed_log_drops_an_incomplete_last_line(tmp_path: Path) -> None:
    TrainingLog(tmp_path, 0).append({"iteration": 20, "losses": {"mask": 0.5}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 40, "los')
    assert [entry["iteration"] for entry in TrainingLog(tmp_path, 40).entries] == [20]


def test_the_plot_is_an_image_even_of_an_empty_log(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    log.plot()
    empty = (tmp_path / "metrics.png").read_bytes()
    log.append({"iteration": 20, "losses": {"mask": 0.5}})
    log.append({"iteration": 20, "scores": SCORES})
    log.plot()
    assert empty.startswith(b"\x89PNG")
    assert (tmp_path / "metrics.png").read_bytes() != empty
