"""benchmarks/gpu_record.py: what becomes of its steps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu_record import Step, results


def test_steps_end_as_they_do(tmp_path):
    """What measures comes last, by itself; no step keeps another from its record."""
    steps = {
        "measures": Step([sys.executable, "-c", "print('measured')"], 60, len_of, measures=True),
        "passes": Step([sys.executable, "-c", "print('fine')"], 60, len_of),
        "fails": Step([sys.executable, "-c", "print('no'); raise SystemExit(3)"], 60),
        "hangs": Step([sys.executable, "-c", "import time; time.sleep(600)"], 0.5),
        "is missing": Step([str(tmp_path / "nothing")], 60),
    }
    found = list(results(steps, list(steps), tmp_path))
    assert found[-1][0] == "measures"
    ended = dict(found)
    assert ended.keys() == steps.keys()
    assert [name for name, result in ended.items() if result["ok"]] == ["passes", "measures"]
    assert ended["passes"]["letters"] == 5
    assert ended["fails"]["ended"] == "exit status 3"
    assert ended["fails"]["log_tail"] == ["no"]
    assert ended["hangs"]["ended"] == "stopped after 0.5 s"
    assert "No such file" in ended["is missing"]["log_tail"][0]


def len_of(log):
    return {"letters": len(log)}
