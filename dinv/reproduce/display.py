"""What the terminal shows while notebooks run: one line a stage, the running one with time left."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import TextIO

BAR = 20  # characters


class Display:
    """Follows the file of progress lines (see `runs.progress`) and shows it on `out`.

    On a terminal the running stage is one line that changes. Elsewhere, in a log, a line is printed
    when a stage starts and ends, and every `every` seconds between.
    """

    def __init__(self, file: Path, out: TextIO, every: float = 30.0):
        self.file, self.out, self.every = file, out, every
        self.live = out.isatty()
        self._offset = 0
        self._began = time.monotonic()
        self._first: dict | None = None  # the running stage's first count: rates start there
        self._last: dict | None = None  # its latest line
        self._shown = self._began
        self._stop = threading.Event()

    def __enter__(self) -> Display:
        self.file.touch()
        self._offset = self.file.stat().st_size
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        self._clear()

    def _follow(self) -> None:
        while not self._stop.wait(0.2):
            self._poll()

    def _poll(self) -> None:
        with open(self.file, encoding="utf-8") as file:
            file.seek(self._offset)
            while (line := file.readline()).endswith("\n"):
                self._offset = file.tell()
                self._take(json.loads(line))
        if self.live:
            self._redraw()
        elif self._last and time.monotonic() - self._shown >= self.every:
            self._print(running_line(self._first, self._last))

    def _take(self, line: dict) -> None:
        state = line["state"]
        if state == "warning":
            self._print(f"  warning: {line['message']}")
        elif state in ("done", "cached", "stopped"):
            self._first = self._last = None
            self._print(finished_line(line))
        else:
            if state == "start" and not self.live:
                self._print(f"  {line['stage']}: started")
            if state == "start" or self._last is None or self._last["stage"] != line["stage"]:
                self._first = None
            if self._first is None and line["total"]:
                self._first = line
            self._last = line

    def _print(self, text: str) -> None:
        self._clear()
        print(text, file=self.out, flush=True)
        self._shown = time.monotonic()

    def _redraw(self) -> None:
        waiting = f"  … {duration(time.monotonic() - self._began)}"
        text = running_line(self._first, self._last) if self._last else waiting
        width = shutil.get_terminal_size().columns
        self._clear()
        self.out.write(text[: width - 1])
        self.out.flush()

    def _clear(self) -> None:
        if self.live:
            self.out.write("\r\x1b[K")


def running_line(first: dict | None, last: dict) -> str:
    """"  pool deepinversion  ━━━━━────  120/512  3.1/s  2:06 left  loss 0.51"."""
    elapsed = last["elapsed"] + max(0.0, time.time() - last["time"])
    if not last["total"]:
        return f"  {last['stage']}  {duration(elapsed)}"
    done, total = last["done"], last["total"]
    filled = round(BAR * min(done / total, 1))
    parts = [f"  {last['stage']}", "━" * filled + "─" * (BAR - filled), f"{done}/{total}"]
    seconds = last["elapsed"] - first["elapsed"] if first else 0.0
    if first and seconds > 0 and done > first["done"]:
        rate = (done - first["done"]) / seconds
        left = max(0.0, (total - done) / rate - (time.time() - last["time"]))
        parts += [f"{rate:.3g}/s", f"{duration(left)} left"]
    parts += [f"{name} {value:.3g}" for name, value in last["numbers"].items()]
    return "  ".join(parts)


def finished_line(line: dict) -> str:
    """"  pool deepinversion  done in 2:10"."""
    if line["state"] == "cached":
        return f"  {line['stage']}  cached ({duration(line['seconds'])} when it was made)"
    if line["state"] == "stopped":
        at = f" at {line['done']}/{line['total']}" if line["total"] else ""
        return f"  {line['stage']}  stopped{at} after {duration(line['elapsed'])}"
    return f"  {line['stage']}  done in {duration(line['seconds'])}"


def duration(seconds: float) -> str:
    """"4.2s", "2:06" or "1:02:06"."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
