"""Waiting for other ranks, but never for ever: and finding out which of them are missing.

A rank that has waited too long tells the others whom it waits for, and listens for a moment. Ranks that are
alive and waiting answer; those that were waited for and say nothing are the ones that are missing. Without that
a rank would blame whoever it happens to wait for, who may only be waiting himself.
"""

import atexit
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

from ..errors import CommError, ConfigError
from .communicator import Step
from .control import Control

SPIN_SECONDS = 1e-3  # of looking without sleeping: most exchanges are over by then
PAUSE_SECONDS = 2e-4
NOTICE_SECONDS = 1e-2  # between two looks at the notices and the clock
FAREWELL_SECONDS = 0.2  # for the last notices to leave
MOST_LISTENING = 1.0  # seconds of the timeout kept for listening to the others


def check_timeout(timeout: object) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigError(f"timeout={timeout!r} must be a number of seconds above 0")


class Watch:
    """The deadline of every exchange of one group."""

    def __init__(self, control: Control, timeout: float) -> None:
        check_timeout(timeout)
        self.control = control
        self.timeout = float(timeout)
        self._count = 0  # of exchanges: the same on every rank that is alive
        self._begun: dict[int, Step] = {}  # and not over
        self._texts: dict[int, dict[int, str]] = {}  # of `gather`, by exchange and rank
        self._heard: list[tuple[int, dict[str, Any]]] = []  # notices of failures
        self._failure: CommError | None = None
        if control.size > 1:
            _watches.add(self)

    @property
    def failed(self) -> bool:
        """Whether the group is of no more use."""
        return self._failure is not None

    def begin(self, step: Step) -> int:
        """The number of the exchange that starts. Raises CommError where the group has failed before."""
        if self._failure is not None:
            raise CommError(
                f"{step} cannot start: the group failed before ({self._failure})",
                self._failure.ranks,
                step.name,
                step.layer,
            )
        self._count += 1
        self._begun[self._count] = step
        return self._count

    def wait(self, number: int, waiting_for: Callable[[], set[int]]) -> None:
        """Returns when ``waiting_for()``, the ranks still missing in exchange ``number``, is empty.

        Raises CommError after the deadline, or as soon as another rank reports a failure.
        """
        start = time.monotonic()
        next_look = start + NOTICE_SECONDS
        while waiting := waiting_for():
            now = time.monotonic()
            if now >= next_look:
                self.look(start, waiting)
                next_look = now + NOTICE_SECONDS
            if now - start < SPIN_SECONDS:
                os.sched_yield()
            else:
                time.sleep(PAUSE_SECONDS)
        self.end(number)

    def end(self, number: int) -> None:
        """Exchange ``number`` is over."""
        del self._begun[number]

    def look(self, since: float, waiting: set[int]) -> None:
        """Raises CommError if another rank reports a failure, or ``waiting`` has lasted too long ``since`` then."""
        self._hear()
        if self._heard or time.monotonic() >= since + self.timeout - self._listening:
            self._fail(waiting)

    def gather(self, text: str, step: Step) -> list[str]:
        """Every rank's text, in the order of ranks; over the control line, so for little and seldom."""
        number, rank = self.begin(step), self.control.rank
        texts = self._texts.setdefault(number, {})
        texts[rank] = text
        self.control.post(json.dumps({"gather": number, "text": text}))

        def missing() -> set[int]:
            self._hear()
            return set(range(self.control.size)) - texts.keys()

        self.wait(number, missing)
        del self._texts[number]
        return [texts[rank] for rank in range(self.control.size)]

    def abort(self, reason: str) -> None:
        """Tell the others, if there are any, that this rank has failed, once."""
        if self._failure is None and self.control.size > 1:
            self._failure = CommError(f"this rank raised {reason}", (self.control.rank,))
            _failed.append(self)
            self.control.post(json.dumps({"raised": reason}))

    @property
    def _listening(self) -> float:
        return min(MOST_LISTENING, self.timeout / 4)

    def _hear(self) -> None:
        for rank, text in self.control.poll():
            notice = json.loads(text)
            if "gather" in notice:
                self._texts.setdefault(notice["gather"], {})[rank] = notice["text"]
            else:
                self._heard.append((rank, notice))

    def _fail(self, waiting: set[int]) -> None:
        number, step = next(iter(self._begun.items()))
        own = {"number": number, "step": list(step), "for": sorted(waiting)}
        self.control.post(json.dumps(own))
        end = time.monotonic() + self._listening
        while True:
            raised = {rank: notice["raised"] for rank, notice in self._heard if "raised" in notice}
            reports = {rank: notice for rank, notice in self._heard if "raised" not in notice}
            reports[self.control.rank] = own
            known = len(reports.keys() | raised.keys())
            if raised or known == self.control.size or time.monotonic() >= end:
                break
            time.sleep(PAUSE_SECONDS)
            self._hear()
        self._failure = self._verdict(reports, raised, step)
        _failed.append(self)
        raise self._failure

    def _verdict(self, reports: dict[int, dict[str, Any]], raised: dict[int, str], step: Step) -> CommError:
        if raised:
            who = "; ".join(f"rank {rank} raised {reason}" for rank, reason in sorted(raised.items()))
            return CommError(f"{step}: {who}", tuple(sorted(raised)), *step)
        # whoever is furthest behind waits for those who are really missing
        first = min(report["number"] for report in reports.values())
        behind = [report for report in reports.values() if report["number"] == first]
        where = Step(*behind[0]["step"])
        missing = {rank for report in reports.values() for rank in report["for"]} - reports.keys()
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            return CommError(
                f"{where}: no sign of {'rank' if len(missing) == 1 else 'ranks'} {names} of "
                f"{self.control.size} within {self.timeout:g} s",
                tuple(sorted(missing)),
                *where,
            )
        places = ", ".join(
            f"rank {rank} at {Step(*report['step'])}" for rank, report in sorted(reports.items())
        )
        return CommError(
            f"{where}: all ranks are there, but it did not end within {self.timeout:g} s ({places}); did a rank "
            "leave out a call, or is the timeout too short for the size?",
            tuple(
                report_rank for report_rank, report in sorted(reports.items()) if report["number"] == first
            ),
            *where,
        )


# --- the end of the process ---

_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_failed: list[Watch] = []


def _leave() -> None:
    """An error that ends this process reaches the ranks that would wait for it.

    After a failure the process ends here: what a transport does at the end of a process (MPI_Finalize, gloo's
    threads) may wait for a rank that never comes.
    """
    error = getattr(sys, "last_value", None)
    if error is not None:
        for watch in list(_watches):
            watch.abort(f"{type(error).__name__}: {error}")
    if not _failed:
        return
    end = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < end:
        for watch in _failed:
            watch.control.poll()  # MPI moves messages only while it is called
        time.sleep(NOTICE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


atexit.register(_leave)
