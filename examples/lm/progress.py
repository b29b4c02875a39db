"""A progress bar: one line redrawn on a terminal, a plain line now and then where there is none."""

import shutil
import sys
import time
from typing import TextIO

BAR_WIDTH = 24
REDRAW_SECONDS = 0.2
PLAIN_LINES = 20  # in a whole run


class Progress:
    """Counts steps of a run from ``first`` (more than 0 when resumed) to ``total``."""

    def __init__(self, first: int, total: int, stream: TextIO = sys.stderr) -> None:
        self.first = first
        self.total = total
        self.stream = stream
        self.redraws = stream.isatty()
        self.started = time.monotonic()
        self.drawn = 0.0
        self.length = 0

    def due(self, step: int) -> bool:
        """Whether ``show`` would be seen now; what it shows may be costly to find out."""
        if step == self.total:
            return True
        if self.redraws:
            return time.monotonic() - self.drawn >= REDRAW_SECONDS
        return step % max(1, self.total // PLAIN_LINES) == 0

    def show(self, step: int, text: str) -> None:
        self.drawn = time.monotonic()
        seconds = (self.drawn - self.started) / max(1, step - self.first) * (self.total - step)
        left = "" if step == self.total else f"  {_clock(seconds)} left"
        counter = f"{step:{len(str(self.total))}}/{self.total}"
        if self.redraws:
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps could not be redrawn
            line = f" {counter}  {text}{left}"
            width = max(0, min(BAR_WIDTH, columns - len(line)))
            filled = width * step // self.total
            line = ("█" * filled + "░" * (width - filled) + line)[:columns]
            self.stream.write("\r" + line.ljust(self.length))
            self.length = len(line)
        else:
            self.stream.write(f"{counter}  {text}{left}\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the bar as it stands and go to the next line."""
        if self.redraws and self.length:
            self.stream.write("\n")
            self.stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
