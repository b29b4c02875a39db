"""examples/in_transformers.py: the model answers as before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

ROOT = Path(__file__).parents[2]
CLOSE = {"cpu": 1e-5, "cuda": 2e-2}  # on a GPU in bfloat16, where theirs rounds the router's logits, too


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_answers_are_those_of_before(device):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "in_transformers.py"), "--device", device],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (count, distance) = re.findall(r"(\d+) blocks replaced; the logits differ by (\S+) of", done.stdout)[0]
    assert count == "4"
    assert float(distance) < CLOSE[device]
    assert "ms with ffmoe" in done.stdout
