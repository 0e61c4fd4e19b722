from benchmarks.metering import SOURCES, call_us, per_frame_us, show_table
from maskcast.pipeline.monitor.trace import Trace
from maskcast.pipeline.stats import Meter

NAMES = [f"cam{number}" for number in range(SOURCES)]


def test_measuring_a_frame_costs_less_than_a_hundredth_of_ten_milliseconds():
    # The least of a few: caches that others have emptied only ever add time.
    assert min(per_frame_us(Meter(NAMES)) for _ in range(3)) < 100
    assert min(per_frame_us(Meter(NAMES, Trace())) for _ in range(3)) < 100


def test_the_live_table_costs_less_than_a_hundredth_of_a_second_in_every_second():
    meter = Meter(NAMES)
    per_frame_us(meter)
    assert 5 * min(call_us(lambda: show_table(meter), calls=10) for _ in range(3)) < 10_000
