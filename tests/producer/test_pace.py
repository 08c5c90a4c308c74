"""A producer's pace is that of its last chunks, until now."""

from penstock.producer.pace import CHUNKS, Pace


def test_rows_per_second_of_the_last_chunks() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.rows_per_second() == 0.0
    now = 10.0
    pace.add(1000)
    assert pace.rows_per_second() == 100.0
    now = 20.0  # nothing came since
    assert pace.rows_per_second() == 50.0
    for _ in range(CHUNKS + 1):
        now += 1.0
        pace.add(1000)
    # what was slow is forgotten: only chunks that came after the first one remembered count
    assert pace.rows_per_second() == 1000.0
    now += 10.0
    pace.add(1000)
    assert 600 < pace.rows_per_second() < 1000
