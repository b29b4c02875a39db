"""Everything that needs a GPU, in one go, with a record of it: `make gpu-test`.

    python benchmarks/gpu_record.py [--results DIR] [STEP ...]

Steps: every test that needs a GPU; over a small selection (tests/cuda/layers.py) compute-sanitizer's memcheck, and
racecheck and initcheck without Hopper's kernels; host time; memory kept. After each step gpu_tests.json is written, so
that a run that is cut short leaves what it had. Steps named alone are merged into a record of the same sources on the
same device. Exits with 1 when a step that ran did not pass.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, environment, sources_digest, write

TAIL_LINES = 60
Details = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A command, how long it may take, and what to read from its log once it has ended."""

    command: list[str]
    timeout: float  # seconds
    details: Callable[[str], Details] = lambda log: {}


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
        steps[name] = Step([python, f"benchmarks/{name}.py", "--out", str(out)], 300)
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


def run(step: Step, log_path: Path) -> Details:
    """Run one step to its end or its time limit; its record."""
    start = time.monotonic()
    with log_path.open("w") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, "FFMOE_REQUIRE_GPU": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return {"ok": False, "seconds": 0.0, "log_tail": [str(error)]}
        try:
            ended = f"exit status {process.wait(step.timeout)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {step.timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log_path.read_text(errors="replace").replace(f"{ROOT}/", "")
    ok = process.returncode == 0
    result = {"ok": ok, "seconds": round(time.monotonic() - start, 1), **step.details(text)}
    if not ok:
        result |= {"ended": ended, "log_tail": text.splitlines()[-TAIL_LINES:]}
    return result


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
        passed = True
        for number, name in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {name} ...", end=" ", flush=True)
            result = run(steps[name], Path(scratch) / f"{name}.log")
            passed = passed and result["ok"]
            print(
                f"{'ok' if result['ok'] else 'FAILED'} in {result['seconds']} s  {brief(result)}", flush=True
            )
            if not result["ok"]:
                print("\n".join(f"    {line}" for line in result["log_tail"]), flush=True)
            # read again, as other steps may have been run beside this one
            done = previous(path, head) if arguments.steps or number > 1 else {}
            done[name] = result
            write(path, {**head, "steps": {key: done[key] for key in steps if key in done}})
    print(f"recorded in {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
