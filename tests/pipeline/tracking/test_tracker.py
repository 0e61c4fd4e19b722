import numpy as np
import pytest

from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.tracking.tracker import LOST_AFTER_S, MAX_TRACKS, Tracker

AXIS = np.linspace(-1, 1, 28)
BODY = np.uint8(255) * (2 * AXIS[None] ** 2 + AXIS[:, None] ** 2 < 1).astype(np.uint8)


def seen(*boxes, scores=None, labels=None, crops=None, size=(640, 480)):
    """Return instances in boxes x1 y1 x2 y2."""
    n = len(boxes)
    return Instances(
        *size,
        np.array(boxes, np.float32).reshape(n, 4),
        np.array(scores or [0.9] * n, np.float32),
        np.array(labels or [1] * n, np.int32),
        np.stack(crops if crops is not None else [BODY] * n)
        if n
        else np.zeros((0, 28, 28), np.uint8),
    )


def at(x, y=100, wide=60, high=180):
    return (x, y, x + wide, y + high)


@pytest.fixture
def tracker():
    return Tracker(0.5)


def ids_after(tracker, begin_s, *frames, step_s=0.04):
    """Return the track ids in the last of some frames."""
    for k, instances in enumerate(frames):
        update = tracker.update(instances, begin_s + step_s * k)
    return update.track_ids.tolist()


def test_two_objects_that_cross_keep_their_ids(tracker):
    ids = []
    for k in range(60):
        left, right = at(40 + 8 * k), at(520 - 8 * k, y=130)
        # Their order changes, as the order of scores does.
        boxes = [left, right] if k % 3 else [right, left]
        found = tracker.update(seen(*boxes), k / 25).track_ids.tolist()
        ids.append(found if k % 3 else found[::-1])
    assert ids[:2] == [[0, 0], [0, 0]]
    assert sorted(ids[2]) == [1, 2]
    assert ids[2:] == [ids[2]] * 58


@pytest.mark.parametrize("drop", [0.3, 0.7])
def test_ids_stay_although_most_frames_are_dropped(tracker, drop):
    rng = np.random.default_rng(4)
    ids = [
        tuple(tracker.update(seen(at(20 + 4 * k), at(560 - 4 * k, y=260)), k / 25).track_ids)
        for k in range(120)
        if rng.random() >= drop
    ]
    named = [pair for pair in ids if pair != (0, 0)]
    assert len(named) >= len(ids) - 2
    assert len(set(named)) == 1


def test_an_object_that_is_hidden_for_a_second_keeps_its_id(tracker):
    for k in range(20):
        first = tracker.update(seen(at(40 + 4 * k)), k / 25).track_ids.tolist()
    for k in range(20, 45):
        tracker.update(seen(), k / 25)
    again = tracker.update(seen(at(40 + 4 * 45)), 45 / 25).track_ids.tolist()
    assert again == first == [1]


def test_a_track_ends_after_two_seconds_and_states_its_duration(tracker):
    for k in range(10):
        tracker.update(seen(at(100)), k / 10)
    ended = []
    for k in range(10, 40):
        ended += [(k / 10, one) for one in tracker.update(seen(), k / 10).ended]
    ((when_s, one),) = ended
    assert when_s == pytest.approx(0.9 + LOST_AFTER_S + 0.1, abs=0.11)
    assert (one.track_id, one.label, one.reason) == (1, 1, "lost")
    assert (one.first_s, one.last_s) == (0, 0.9)
    assert ids_after(tracker, 4.0, *[seen(at(100))] * 4) == [2]


def test_labels_do_not_mix(tracker):
    assert ids_after(tracker, 0.0, *[seen(at(100), labels=[1])] * 4) == [1]
    assert ids_after(tracker, 0.2, *[seen(at(100), labels=[2])] * 4) == [2]


def test_masks_decide_where_boxes_are_alike(tracker):
    left = np.uint8(255) * np.repeat((AXIS < 0)[None], 28, axis=0).astype(np.uint8)
    both = seen(at(100), at(100), crops=[left, 255 - left])
    first = np.array(ids_after(tracker, -0.16, both, both, both, both))
    for k in range(1, 9):
        crops = [left, 255 - left] if k % 2 else [255 - left, left]
        ids = tracker.update(seen(at(100), at(100), crops=crops), k / 25).track_ids
        assert ids.tolist() == (first if k % 2 else first[::-1]).tolist()


def test_a_track_gets_its_id_when_it_has_been_seen_for_some_time(tracker):
    ids = [tracker.update(seen(at(100 + k)), 0.04 * k).track_ids.tolist() for k in range(4)]
    assert ids == [[0], [0], [1], [1]]


def test_at_a_low_frame_rate_two_detections_are_enough(tracker):
    assert ids_after(tracker, 0.0, *[seen(at(100))] * 2, step_s=0.3) == [1]


def test_detections_with_high_scores_are_matched_first(tracker):
    for k in range(5):
        tracker.update(seen(at(100)), k / 25)
    update = tracker.update(seen(at(103), at(100), scores=[0.9, 0.51]), 0.2)
    assert update.track_ids.tolist() == [1, 0]


def test_a_false_alarm_gets_no_id_and_ends_without_an_event(tracker):
    assert tracker.update(seen(at(100)), 0.0).track_ids.tolist() == [0]
    assert not any(tracker.update(seen(), k / 10).ended for k in range(1, 40))
    assert len(tracker) == 0


def test_another_frame_size_ends_all_tracks(tracker):
    for k in range(5):
        tracker.update(seen(at(100), at(300)), k / 25)
    update = tracker.update(seen(at(100), size=(1280, 720)), 0.2)
    assert [(one.track_id, one.reason) for one in update.ended] == [(1, "size"), (2, "size")]
    assert update.track_ids.tolist() == [0]
    assert ids_after(tracker, 0.24, *[seen(at(100), size=(1280, 720))] * 3) == [3]


@pytest.mark.parametrize("time_s", [0.0, 60.0])
def test_a_clock_that_jumps_ends_all_tracks(tracker, time_s):
    for k in range(5):
        tracker.update(seen(at(100)), 5 + k / 25)
    update = tracker.update(seen(at(100)), time_s)
    assert [one.reason for one in update.ended] == ["time"]
    assert ids_after(tracker, time_s + 0.04, *[seen(at(100))] * 3) == [2]


def test_a_slow_source_has_tracks_too(tracker):
    updates = [tracker.update(seen(at(100 + 5 * k)), 1.5 * k) for k in range(8)]
    assert [update.track_ids.tolist() for update in updates] == [[0]] + [[1]] * 7


def test_memory_is_bounded_whatever_is_seen(tracker):
    rng = np.random.default_rng(0)
    for k in range(200):
        corner = rng.uniform(0, 400, (100, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 60, (100, 2))])
        update = tracker.update(seen(*boxes), k / 500)
        named = update.track_ids[update.track_ids > 0]
        assert len(set(named.tolist())) == len(named)
    assert len(tracker) <= MAX_TRACKS + 100


def test_a_model_without_masks_is_tracked_by_boxes(tracker):
    for k in range(5):
        plain = seen(at(100 + 3 * k), at(300))
        boxes = Instances(640, 480, plain.boxes, plain.scores, plain.labels)
        ids = tracker.update(boxes, k / 25).track_ids.tolist()
    assert ids == [1, 2]


def test_two_frames_of_one_time_are_no_error(tracker):
    tracker.update(seen(at(100)), 1.0)
    tracker.update(seen(at(101)), 1.0)
    assert len(tracker) == 1
