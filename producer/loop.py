"""The produce loop: claimed index → tokens → activations → chunk → objects → commit → announce.

Any number of producers work on one dataset. Leases keep them from making the same chunk; when a lease
is wrong (a slow producer, a lost Redis) a chunk is made twice and the first writer wins.
"""

import threading

from penstock.producer.sink import Sink
from penstock.producer.source import Source
from penstock.producer.work import Work


def produce(work: Work, source: Source, sink: Sink, stop: threading.Event) -> None:
    """Make chunks until the dataset is complete and nothing waits for repair, or `stop` is set."""
    while not stop.is_set():
        task = work.next(stop)
        if task is None:
            break
        chunk = source.chunk(task.index)
        sink.put(task, chunk)
    sink.finish()
