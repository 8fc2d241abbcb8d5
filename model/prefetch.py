"""Making the next batches in a thread while the device computes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Yield ``items``, made up to ``depth`` ahead in a thread; errors there are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if closed.is_set():
                    return
                put((item, None))
            put((end, None))
        except BaseException as error:  # handed over whatever it is
            put((end, error))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()
