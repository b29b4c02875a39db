"""Everything that needs a GPU, in one go, with a record of it: `make gpu-test`.

    python benchmarks/gpu_record.py [--results DIR] [STEP ...]

Steps: every test that needs a GPU; over a small selection (tests/cuda/layers.py) compute-sanitizer's memcheck, and
racecheck and initcheck without Hopper's kernels; host time; memory kept. The last two measure, and run by themselves
when the others, which run beside each other, are over. After each step gpu_tests.json is written, so that a run that is
cut short leaves what it had. Steps named alone are merged into a record of the same sources on the same device. Exits
with 1 when a step that ran did not pass.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, environment, sources_digest, write

TAIL_LINES = 60
POLL_SECONDS = 0.1
Details = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A command, how long it may take, and what to read from its log once it has ended."""

    command: list[str]
    timeout: float  # seconds
    details: Callable[[str], Details] = lambda log: {}
    measures: bool = False  # so that nothing may run beside it


def all_steps(results: Path, scratch: Path) -> dict[str, Step]:
    python = sys.executable
    report = scratch / "pytest.xml"
    steps = {
        "tests": Step(
            [python, "-m", "pytest", "-m", "gpu", f"--junitxml={report}"],
            1500,
            lambda log: test_counts(report),
        )
    }
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = [sanitizer(), "--tool", tool, "--error-exitcode", "99", python, "-m", "tests.cuda.sanitize"]
        if tool != "memcheck":
            command.append(
                "--portable"
            )  # of the copy engine they see too little: tests/cuda/sanitizer_limits.py
        steps[tool] = Step(command, 300, sanitizer_summary)
    for name in ("host_time", "memory_kept"):
        out = results / f"{name}.json"
        steps[name] = Step([python, f"benchmarks/{name}.py", "--out", str(out)], 300, measures=True)
    return steps


def sanitizer() -> str:
    """compute-sanitizer: on the PATH, or where CUDA installs itself."""
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def test_counts(report: Path) -> Details:
    """Counts of pytest's XML report, and why tests were skipped."""
    if not report.exists():
        return {}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    reasons = Counter(
        element.get("message", "") for suite in suites for element in suite.iterfind("testcase/skipped")
    )
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
        "skip_reasons": dict(reasons.most_common()),
    }


def sanitizer_summary(log: str) -> Details:
    lines = [line.strip("= ") for line in log.splitlines() if line.startswith("=====") and "SUMMARY" in line]
    return {"summary": "; ".join(lines)}


class Run:
    """One step under way."""

    def __init__(self, step: Step, log_path: Path) -> None:
        self.step = step
        self.log_path = log_path
        self.start = time.monotonic()
        with log_path.open("w") as log:
            self.process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, "FFMOE_REQUIRE_GPU": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def over(self) -> bool:
        """Whether it has ended, or has to be stopped."""
        return self.process.poll() is not None or time.monotonic() > self.start + self.step.timeout

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> Details:
        """Its record; it is stopped where it has not ended."""
        code = self.process.poll()
        self.stop()
        text = self.log_path.read_text(errors="replace").replace(f"{ROOT}/", "")
        seconds = round(time.monotonic() - self.start, 1)
        result = {"ok": code == 0, "seconds": seconds, **self.step.details(text)}
        if code != 0:
            ended = f"stopped after {self.step.timeout:g} s" if code is None else f"exit status {code}"
            result |= {"ended": ended, "log_tail": text.splitlines()[-TAIL_LINES:]}
        return result


def results(steps: dict[str, Step], chosen: list[str], scratch: Path) -> Iterator[tuple[str, Details]]:
    """The chosen steps as they end: beside each other, and those that measure one by one when the others are over."""
    together = [name for name in chosen if not steps[name].measures]
    for names in (together, *([name] for name in chosen if steps[name].measures)):
        runs: dict[str, Run] = {}
        try:
            for name in names:
                try:
                    runs[name] = Run(steps[name], scratch / f"{name}.log")
                except OSError as error:
                    yield name, {"ok": False, "seconds": 0.0, "log_tail": [str(error)]}
            while runs:
                for name in [name for name, run in runs.items() if run.over]:
                    yield name, runs.pop(name).result()
                time.sleep(POLL_SECONDS)
        finally:
            for run in runs.values():
                run.stop()


def brief(result: Details) -> str:
    """One line's worth of a step's record."""
    words = [f"{result[key]} {key}" for key in ("passed", "failed", "skipped") if key in result]
    words += [result[key] for key in ("summary", "ended") if result.get(key)]
    return ", ".join(words)


def previous(path: Path, head: Details) -> Details:
    """The steps already recorded for the same sources on the same device."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    same = all(record.get(key) == head.get(key) for key in ("sources", "device", "driver", "versions"))
    return record["steps"] if same else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the records go")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all")
    arguments = parser.parse_args()

    head = {**environment(), "sources": sources_digest()}
    if "device" not in head:
        raise SystemExit("gpu_record.py needs an NVIDIA GPU, and nvidia-smi shows none here")
    path = arguments.results.resolve() / "gpu_tests.json"
    with tempfile.TemporaryDirectory(prefix="ffmoe-gpu-") as scratch:
        steps = all_steps(path.parent, Path(scratch))
        unknown = sorted(set(arguments.steps) - set(steps))
        if unknown:
            parser.error(f"unknown step {', '.join(unknown)}; known: {', '.join(steps)}")
        chosen = arguments.steps or list(steps)
        done = previous(path, head) if arguments.steps else {}
        passed = True
        print(f"running {', '.join(chosen)} ...", flush=True)
        for name, result in results(steps, chosen, Path(scratch)):
            passed = passed and result["ok"]
            print(
                f"{name}: {'ok' if result['ok'] else 'FAILED'} in {result['seconds']} s  {brief(result)}",
                flush=True,
            )
            if not result["ok"]:
                print("\n".join(f"    {line}" for line in result["log_tail"]), flush=True)
            done[name] = result
            write(path, {**head, "steps": {key: done[key] for key in steps if key in done}})
    print(f"recorded in {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
