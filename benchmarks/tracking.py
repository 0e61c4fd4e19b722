"""Measure the quality and the speed of tracking, compared with ByteTrack and OC-SORT.

Run: ``python -m benchmarks.tracking [--photographs FOLDER] [--scenes N] [--json]``. People cut out
of photographs cross, hide each other, leave and return (``benchmarks/moving_people.py``); the
bundle's engine detects them. Without a folder of photographs, figures are drawn and detections
simulated. All trackers are given the same instances and times, with no frames, 30 % and 70 %
dropped. The other trackers and the metrics (HOTA, IDF1, identity switches) are those of the package
``trackers``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.moving_people import (
    FPS,
    FRAMES,
    HEIGHT,
    WIDTH,
    Scene,
    Truth,
    cut_outs,
    silhouettes,
    simulate_detections,
)
from maskcast.engines.engine import Engine
from maskcast.engines.instances.instances import Instances
from maskcast.engines.load import load_engine
from maskcast.pipeline.configuration.zones import ZoneConfig
from maskcast.pipeline.tracking.regions import Regions
from maskcast.pipeline.tracking.tracker import Tracker

DROPS = (0.0, 0.3, 0.7)
FIRST_SEED = 1000
"""Scenes from here on are reported. The tracker's constants were chosen on scenes below 100."""

Follow = Callable[[Instances, float], NDArray[np.int64]]
"""Maps the instances of a frame and its time, seconds, to their ids ``[N]``; 0 or less for none."""


def maskcast_tracker(min_score: float) -> Follow:
    """Return maskcast's tracker."""
    tracker = Tracker(min_score)
    return lambda instances, time_s: tracker.update(instances, time_s).track_ids.astype(np.int64)


def other_tracker(kind: str) -> Follow:
    """Return a tracker of the package ``trackers``, given the times too, as it recommends."""
    import supervision
    import trackers

    tracker = {"bytetrack": trackers.ByteTrackTracker, "ocsort": trackers.OCSORTTracker}[kind](
        frame_rate=FPS
    )

    def follow(instances: Instances, time_s: float) -> NDArray[np.int64]:
        detections = supervision.Detections(
            instances.boxes.astype(np.float64),
            confidence=instances.scores,
            class_id=instances.labels.astype(int),
            data={"index": np.arange(len(instances))},
        )
        found = tracker.update(detections, timestamp=time_s)
        ids = np.full(len(instances), -1, np.int64)
        if len(found):  # they are returned in another order
            ids[found.data["index"]] = found.tracker_id
        return np.where(ids >= 0, ids + 1, 0)

    return follow


def detect(engine: Engine, scene: Scene, index: int) -> Instances:
    """Run the engine on a rendered frame."""
    import av

    from maskcast.engines.image import fit_image

    image = fit_image(av.VideoFrame.from_image(scene.image(index)), 0, engine.manifest.input)
    (instances,) = engine.segment(engine.detect([image], engine.manifest.score_threshold))
    return instances


def score(
    truths: list[Truth], seen: list[Instances], kept: list[int], follow: Follow
) -> dict[str, Any]:
    """Run a tracker over the kept frames of one scene and measure it."""
    from trackers.eval import (
        box_iou,
        compute_clear_metrics,
        compute_hota_metrics,
        compute_identity_metrics,
    )

    true_ids, ids, similarity = [], [], []
    for index in kept:
        found = follow(seen[index], index / FPS)
        shown = found > 0
        true_ids.append(truths[index].ids - 1)
        ids.append(found[shown])
        boxes = seen[index].boxes[shown]
        similarity.append(
            box_iou(truths[index].boxes.astype(float), boxes.astype(float))
            if len(boxes) and len(truths[index].ids)
            else np.zeros((len(truths[index].ids), len(boxes)))
        )
    known = {number: i for i, number in enumerate(sorted({int(n) for f in ids for n in f}))}
    ids = [np.array([known[int(n)] for n in f], np.int64) for f in ids]
    return {
        "hota": compute_hota_metrics(true_ids, ids, similarity),
        "identity": compute_identity_metrics(true_ids, ids, similarity),
        "clear": compute_clear_metrics(true_ids, ids, similarity),
        "ids": len(known),
        "people": len({int(n) for f in true_ids for n in f}),
    }


def compare(
    scenes: list[tuple[list[Truth], list[Instances]]], min_score: float, seed: int
) -> list[dict[str, Any]]:
    """Measure every tracker on every scene at every rate of dropped frames."""
    from trackers.eval import (
        aggregate_clear_metrics,
        aggregate_hota_metrics,
        aggregate_identity_metrics,
    )

    makers: dict[str, Callable[[], Follow]] = {
        "maskcast": lambda: maskcast_tracker(min_score),
        "bytetrack": lambda: other_tracker("bytetrack"),
        "ocsort": lambda: other_tracker("ocsort"),
    }
    rows = []
    for drop in DROPS:
        for name, make in makers.items():
            results = []
            for number, (truths, seen) in enumerate(scenes):
                rng = np.random.default_rng([seed, number])
                kept = [i for i in range(len(truths)) if rng.random() >= drop]
                results.append(score(truths, seen, kept, make()))
            rows.append(
                {
                    "dropped": drop,
                    "tracker": name,
                    "HOTA": aggregate_hota_metrics([r["hota"] for r in results])["HOTA"],
                    "IDF1": aggregate_identity_metrics([r["identity"] for r in results])["IDF1"],
                    "switches": aggregate_clear_metrics([r["clear"] for r in results])["IDSW"],
                    "ids": sum(r["ids"] for r in results),
                    "people": sum(r["people"] for r in results),
                }
            )
    return rows


def crowd(count: int, index: int) -> Instances:
    """Make people in rows and columns that overlap their neighbours and sway."""
    columns = int(np.ceil(np.sqrt(count * WIDTH / HEIGHT)))
    rng = np.random.default_rng(index)
    cell = WIDTH / columns
    x = (np.arange(count) % columns + 0.5) * cell + 0.3 * cell * np.sin(
        index / 9 + np.arange(count)
    )
    y = (np.arange(count) // columns + 0.5) * cell
    half = np.array([0.45 * cell, 0.9 * cell])
    boxes = np.stack([x - half[0], y - half[1], x + half[0], y + half[1]], axis=1)
    boxes = np.clip(boxes + rng.normal(0, 0.02 * cell, boxes.shape), 0, [WIDTH, HEIGHT] * 2)
    axis = np.linspace(-1, 1, 28)
    body = np.uint8(255) * (axis[:, None] ** 2 + 2 * axis[None] ** 2 < 0.95)
    return Instances(
        WIDTH,
        HEIGHT,
        boxes.astype(np.float32),
        np.linspace(0.99, 0.5, count, dtype=np.float32),
        np.ones(count, np.int32),
        np.repeat(body[None].astype(np.uint8), count, axis=0),
    )


def cost(count: int, frames: int = 400) -> dict[str, Any]:
    """Time the tracker on a dense crowd, of which one in ten is missed in each frame."""
    tracker, times_ms = Tracker(0.5), []
    for index in range(frames):
        people = crowd(count, index)
        rng = np.random.default_rng(index)
        people = people[np.sort(rng.permutation(count)[: count - count // 10])]
        times_ms.append(_time_ms(lambda p=people, i=index: tracker.update(p, i / FPS)))
    return {"what": f"{count} tracks", **_summary(times_ms)}


def zones_cost(frames: int = 400) -> dict[str, Any]:
    """Time what 8 zones of four corners cost with 20 instances, a third of them at an edge."""
    zones = [
        ZoneConfig(
            name=f"zone{k}",
            polygon=((x, y), (x + 0.3, y + 0.05), (x + 0.28, y + 0.5), (x, y + 0.4)),
        )
        for k, (x, y) in enumerate((x, y) for x in (0.02, 0.22, 0.44, 0.66) for y in (0.05, 0.45))
    ]
    regions, times_ms = Regions(zones, (), ("background", "person")), []
    for index in range(frames):
        people = crowd(20, index)
        people = replace(people, track_ids=np.arange(1, 21, dtype=np.int32))
        times_ms.append(_time_ms(lambda p=people, i=index: regions.update(p, i / FPS, i, i)))
    return {"what": "20 instances, 8 zones", **_summary(times_ms)}


def _time_ms(work: Callable[[], object]) -> float:
    """Return the processor time of a call, which other programs affect less than wall time."""
    begin_ns = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - begin_ns) / 1e6


def _summary(times_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times_ms[20:], [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def make_scenes(
    first: int, count: int, photographs: Path | None
) -> tuple[list[tuple[list[Truth], list[Instances]]], float]:
    """Make scenes and their detections; also return the minimum score of a detection."""
    if photographs is None:
        figures, backgrounds, engine = silhouettes(first, 24), [], None
    else:
        figures, backgrounds = cut_outs(photographs, 60)
        engine = load_engine("default")
    made = []
    for seed in range(first, first + count):
        scene, rng = Scene(seed, figures, backgrounds), np.random.default_rng(seed)
        truths = [scene.truth(index) for index in range(FRAMES)]
        seen = [
            simulate_detections(truth, rng) if engine is None else detect(engine, scene, index)
            for index, truth in enumerate(truths)
        ]
        made.append((truths, seen))
    if engine is None:
        return made, 0.5
    engine.close()
    return made, engine.manifest.score_threshold


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, help="folder with instances_val.json, images/")
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    scenes, min_score = make_scenes(arguments.seed, arguments.scenes, arguments.photographs)
    rows = compare(scenes, min_score, arguments.seed)
    costs = [cost(20), cost(100), zones_cost()]
    if arguments.json:
        print(json.dumps({"quality": rows, "cost": costs}))
        return
    print(
        f"{'dropped':>8} {'tracker':>10} {'HOTA':>6} {'IDF1':>6} {'switches':>9} {'ids':>5} people"
    )
    for row in rows:
        print(
            f"{row['dropped']:>8.0%} {row['tracker']:>10} {row['HOTA']:>6.3f} {row['IDF1']:>6.3f} "
            f"{row['switches']:>9} {row['ids']:>5} {row['people']}"
        )
    for row in costs:
        print(f"{row['what']}: p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms")


if __name__ == "__main__":
    main()
