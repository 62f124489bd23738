"""Progress on stderr for work without steps to count: a bar that shows the seconds gone by."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def compiling(title: str) -> Iterator[None]:
    """A line with a running clock while the block runs; where stderr is no terminal, one line when it is done."""
    if not sys.stderr.isatty():
        start = time.perf_counter()
        yield
        print(f"{title}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return
    bar = tqdm(total=1, desc=title, bar_format="{desc}: {bar} {elapsed}", leave=True)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
        bar.update(1)
    finally:
        done.set()
        thread.join()
        bar.close()
