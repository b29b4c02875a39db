"""examples/train_lm.py, run as a user runs it: a model of a few thousand weights, for a few steps."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
SIZES = {"layers": 2, "width": 32, "hidden": 16, "experts": 4, "context": 32, "batch": 4}
TINY = ["--device", "cpu", *(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of different text, small enough to evaluate on in no time."""
    folder = tmp_path_factory.mktemp("text")
    letters, digits = folder / "letters.txt", folder / "digits.txt"
    letters.write_text("the quick brown fox jumps over the lazy dog <&>. " * 120)
    digits.write_text("".join(f"{n * n % 9973:05}," for n in range(1000)))
    return [str(letters), str(digits)]


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """The folder and the output of one run to its end, which several tests look at."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, *TINY, "--steps", "20", "--text", *texts)


def command(folder, *options):
    return [sys.executable, str(ROOT / "examples" / "train_lm.py"), "--out", str(folder), *options]


def environment():
    """One thread: these models are too small for more."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(folder, *options, code=0):
    done = subprocess.run(
        command(folder, *options), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(left, right):
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class Page(HTMLParser):
    """The tags and the visible words of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_a_run_learns_prints_and_saves(whole):
    folder, output = whole
    before, after = map(float, re.search(r"mean +([\d.]+) +([\d.]+)", output).groups())
    assert 7.5 < before < 8.5
    assert after < before - 0.5
    assert "tokens/s" in output
    assert "imbalance" in output
    assert "--- letters ---" in output
    state = checkpoint(folder)
    assert state["step"] == len(state["history"]["train"]) == 20
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "report.html"}


def test_report_has_the_plots_and_loads_nothing(whole):
    html = (whole[0] / "report.html").read_text()
    page = Page(html)
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == [
        "Loss over the run",
        "Held-out bits a byte by domain",
        "Expert load by layer",
        "Expert load by domain, layer 1",
        "Expert load by domain, layer 2",
    ]
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    assert "url(" not in html
    words = "".join(page.words)
    assert "<&>" in words  # of the text itself: escaped, or it would have gone as a tag
    assert "nan" not in re.findall(r"\w+", words)


def test_dense_twin(texts, tmp_path):
    output = train(tmp_path, *TINY, "--dense", "--steps", "3", "--text", *texts)
    assert "dense twin" in output
    assert "imbalance" not in output
    assert not any("gate" in name for name in checkpoint(tmp_path)["model"])
    assert "Expert load" not in (tmp_path / "report.html").read_text()


def test_default_text(tmp_path):
    output = train(tmp_path, *TINY, "--steps", "2")
    assert "python docs" in output
    assert "python code" in output


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_saves_and_resuming_gives_the_same_bits(whole, texts, tmp_path):
    folder, _ = whole
    options = [*TINY, "--steps", "20", "--text", *texts]
    process = subprocess.Popen(
        command(tmp_path, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if re.match(r" *10/20 ", line):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    (again,) = re.findall("Go on with: (.*)", output)
    stopped = checkpoint(tmp_path)
    assert 10 <= stopped["step"] < 20
    assert not (tmp_path / "report.html").exists()

    subprocess.run(shlex.split(again), env=environment(), capture_output=True, check=True, timeout=120)
    assert checkpoint(tmp_path)["step"] == 20
    assert (tmp_path / "report.html").exists()
    resumed, straight = checkpoint(tmp_path), checkpoint(folder)
    for state in resumed, straight:
        del state["history"]["seconds"]
    assert same(resumed, straight)


# Runs it once for each list of arguments, as importing torch takes longer than any of these.
ONE_BY_ONE = """
import contextlib, io, json, runpy, sys
program, *runs = json.load(sys.stdin)
ended = []
for arguments in runs:
    sys.argv = [program, *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(errors):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            ended.append((end.code, errors.getvalue()))
print(json.dumps(ended))
"""


def test_errors_are_readable(whole, tmp_path):
    folder, _ = whole
    again = "--resume", "--device", "cpu"
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for name in ("cut", "tensor", "keys"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut" / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    torch.save(torch.zeros(3), tmp_path / "tensor" / "checkpoint.pt")
    torch.save({"config": checkpoint(folder)["config"]}, tmp_path / "keys" / "checkpoint.pt")
    cases = [
        ("no such file", tmp_path, "--text", str(tmp_path / "none.txt")),
        ("nothing to resume", tmp_path / "none", *again),
        ("--experts is 4 there", folder, *again, "--experts", "8"),
        ("top_k", tmp_path, *TINY, "--top-k", "9"),
        ("multiple of 32", tmp_path, "--width", "33"),
        ("nan is not a finite number above 0", tmp_path, "--learning-rate", "nan"),
        ("--device nowhere", tmp_path, "--device", "nowhere"),
        ("--device meta is neither cpu nor cuda", tmp_path, "--device", "meta"),
        ("use a longer text", tmp_path, *TINY, "--text", str(short)),
        ("not a checkpoint", tmp_path / "cut", *again),
        ("it holds a tensor", tmp_path / "tensor", *again),
        ("it has no text_digest", tmp_path / "keys", *again),
    ]
    program = ROOT / "examples" / "train_lm.py"
    runs = [str(program), *(command(*case[1:])[2:] for case in cases)]
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        cwd=program.parent,
        env=environment(),
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for (message, *_), (code, output) in zip(cases, json.loads(done.stdout), strict=True):
        assert code == 2, output
        assert message in output.lower(), output


def test_resuming_on_changed_text_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("once upon a time " * 400)
    train(tmp_path, *TINY, "--steps", "2", "--text", str(text))
    text.write_text("twice upon a time " * 400)
    assert "the text is not the one" in train(tmp_path, "--resume", "--device", "cpu", code=2)
