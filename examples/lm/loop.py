"""The training loop: steps, held-out text now and then, checkpoints, and a clean end on Ctrl-C."""

import math
import signal
import time
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from .evaluate import evaluate
from .progress import Progress
from .run import Run

EVALUATIONS = 8  # in a whole run, besides the one before its first step


class StopRequest:
    """While open, Ctrl-C (or SIGTERM) only sets ``made``; a second one ends the program at once."""

    def __enter__(self) -> "StopRequest":
        self.made = False
        signals = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self._make) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _make(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(number, signal.SIG_DFL)


class Meter:
    """Losses and time of the steps since the last reading; a reading waits for the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.losses: list[Tensor] = []
        self.steps = 0
        self.seconds = 0.0
        self.start()

    def start(self) -> None:
        """Time from here on; what came before (an evaluation) is not training."""
        self.started = time.monotonic()

    def read(self) -> None:
        """Move what was measured into the run's history."""
        if not self.losses:
            return
        self.run.history.train += torch.stack(self.losses).tolist()
        seconds = time.monotonic() - self.started
        self.run.history.seconds += seconds
        self.seconds += seconds
        self.steps += len(self.losses)
        self.losses.clear()
        self.start()

    @property
    def tokens_per_second(self) -> float:
        config = self.run.config
        return self.steps * config.batch * config.model.context / self.seconds


def train(run: Run, folder: Path) -> bool:
    """Train to the last step; False where Ctrl-C came first. Either way the checkpoint is in ``folder``."""
    steps = run.config.steps
    evaluations = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    progress = Progress(run.step, steps)
    with StopRequest() as stop:
        if run.step == 0 and not run.history.held_out:
            note_held_out(run)
        meter = Meter(run)
        while run.step < steps and not run.ranks.any(stop.made):
            meter.losses.append(run.advance())
            if progress.due(run.step):
                meter.read()
                progress.show(run.step, describe(run, meter))
            if run.step in evaluations:
                meter.read()
                note_held_out(run)
                run.save(folder)
                meter.start()
        meter.read()
        progress.end()
        run.save(folder)
    return run.step == steps


def note_held_out(run: Run) -> None:
    bits = evaluate(run.model, run.corpus, run.config.model.context, run.device).bits
    run.history.held_out.append((run.step, bits))


def describe(run: Run, meter: Meter) -> str:
    """The figures beside the bar: smoothed loss, held-out bits a byte, speed and load."""
    recent = run.history.train[-20:]
    bits = sum(recent) / len(recent)
    held_out = run.history.held_out[-1][1]
    parts = [
        f"loss {bits * math.log(2):.2f}",
        f"{bits:.2f} bits/byte (held-out {sum(held_out) / len(held_out):.2f})",
        f"{meter.tokens_per_second:,.0f} tokens/s",
    ]
    if layers := run.model.moe_layers:
        parts.append(f"imbalance {max(float(layer.stats().load_imbalance) for layer in layers):.2f}")
    return "  ".join(parts)
