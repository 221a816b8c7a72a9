"""Progress of a stage: a bar on stderr for people, JSON lines in a file for `reproduce`."""

import json
import os
import sys
import time
from contextlib import suppress

from tqdm import tqdm

EVERY = 0.2  # seconds between two lines of the progress file


class Progress:
    """Shows how far one stage is. With DINV_PROGRESS set it writes to that file and prints nothing.

    Each line of the file is one JSON object: time (unix seconds), chapter, stage, state ("start",
    "run", "done", "cached", "stopped" or "warning"), done, total, numbers, elapsed (seconds in
    this process).
    """

    def __init__(self, chapter: str, stage: str):
        self.chapter, self.stage = chapter, stage
        self.started = time.monotonic()
        self._counts: dict = {"done": 0, "total": None, "numbers": {}}
        self._written = -EVERY
        self._bar: tqdm | None = None

    def update(self, done: int, total: int, numbers: dict[str, float]) -> None:
        numbers = {name: float(value) for name, value in numbers.items()}
        self._counts = {"done": int(done), "total": int(total), "numbers": numbers}
        if os.environ.get("DINV_PROGRESS"):
            now = time.monotonic()
            if done >= total or now - self._written >= EVERY:
                self._written = now
                self.write("run")
        elif interactive():
            if self._bar is None:
                self._bar = tqdm(
                    desc=self.stage, total=total, initial=done, leave=False, file=sys.stderr
                )
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(done - self._bar.n)

    def write(self, state: str, **more) -> None:
        """Append one line to the progress file, if there is one."""
        if path := os.environ.get("DINV_PROGRESS"):
            line = {"time": time.time(), "chapter": self.chapter, "stage": self.stage}
            line |= {"state": state} | self._counts
            line |= {"elapsed": time.monotonic() - self.started} | more
            # a display that cannot be written to must not end hours of work
            with suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self, state: str, **more) -> None:
        self.write(state, **more)
        if self._bar is not None:
            self._bar.close()

    def warn(self, message: str) -> None:
        """A warning on stderr, which `reproduce` repeats on the terminal."""
        print(f"dinv: {message}", file=sys.stderr)
        self.write("warning", message=message)


def interactive() -> bool:
    """True where a bar is of use: on a terminal or in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
