import numpy as np
import pytest

from maskcast.pipeline.tracking.motion import MAX_DEVIATIONS, Motion, Step

FRAME = (640.0, 480.0)


def box(x, y=200.0, wide=60.0, high=160.0):
    return (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)


def following(speed, times_s, start=100.0):
    """Return a motion that was corrected with an object of constant speed at these times."""
    motion = Motion(box(start))
    last_s = 0.0
    for time_s in times_s:
        motion.predict(Step.of(time_s - last_s))
        motion.correct(box(start + speed * time_s), FRAME)
        last_s = time_s
    return motion


@pytest.mark.parametrize("step_s", [0.02, 0.04, 0.1, 0.3])
def test_a_steady_object_is_where_it_is_expected_at_any_frame_rate(step_s):
    motion = following(80.0, np.arange(step_s, 1.5, step_s))
    begin = motion.state[0]
    motion.predict(Step.of(0.4))
    assert motion.state[0] - begin == pytest.approx(80 * 0.4, rel=0.25)


def test_irregular_times_are_used_as_they_are():
    times_s = np.cumsum(np.random.default_rng(3).uniform(0.03, 0.3, 20))
    motion = following(80.0, times_s, start=50)
    assert motion.speed[0] == pytest.approx(80, rel=0.1)


def test_one_long_step_is_about_as_uncertain_as_many_short_ones():
    once, often = following(80.0, [0.1, 0.2, 0.3]), following(80.0, [0.1, 0.2, 0.3])
    once.predict(Step.of(0.6))
    for _ in range(6):
        often.predict(Step.of(0.1))
    assert once.state == pytest.approx(often.state, abs=1e-6)
    far = box(300.0)
    assert once.distance(far, FRAME) == pytest.approx(often.distance(far, FRAME), rel=0.5)


def test_an_object_that_is_half_hidden_keeps_its_size_and_speed():
    motion = following(80.0, np.arange(0.04, 1, 0.04))
    speed, width = motion.speed[0], motion.state[2]
    for k in range(8):  # its front is hidden by an object that begins at x = 180
        motion.predict(Step.of(0.04))
        x = 100 + 80 * (1 + 0.04 * k)
        motion.correct((x - 30, 120.0, 180.0 + 0.01 * k, 280.0), FRAME)
    assert motion.speed[0] == pytest.approx(speed, rel=0.3)
    assert motion.state[2] > 0.8 * width


def test_a_part_of_an_object_is_more_likely_than_a_box_elsewhere():
    motion = following(0.0, np.arange(0.04, 1, 0.04), start=300.0)
    boxes = (box(302.0), (270.0, 120.0, 330.0, 200.0), box(420.0))  # the second: its upper half
    unlikely = [motion.distance(one, FRAME) for one in boxes]
    assert unlikely[0] < unlikely[1] < 5 < unlikely[2]


def test_an_object_that_enters_is_not_slowed_by_the_border():
    motion = Motion((0.0, 120.0, 10.0, 280.0))
    for k in range(1, 12):
        motion.predict(Step.of(0.04))
        motion.correct((0.0, 120.0, 10 + 100 * 0.04 * k, 280.0), FRAME)
    assert motion.speed[0] == pytest.approx(100, rel=0.25)


def test_a_new_object_is_where_it_was_seen():
    motion = Motion(box(300.0))
    assert motion.box == box(300.0)
    assert motion.distance(box(300.0), FRAME) == 0
    reach_x, reach_y = motion.reach()
    assert reach_x > 30
    assert reach_y > 80
    assert motion.distance(box(301.0 + reach_x), FRAME) > MAX_DEVIATIONS**2
