"""benchmarks/ep_overlap.py: its switches do what they are called, and its timelines say what ran when."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

from ffmoe_core.comm.local import LocalCommunicator
from ffmoe_torch.dense_glu import start_glu

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ep_overlap
import timeline
from timeline import EXCHANGES, LAYER, MARK, SIDE, Span

SHAPE = (6, 8, 4, 4, 2)


class Waiting:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait(self):
        self.log.append(f"end {self.name}")


class Logging(LocalCommunicator):
    """A group of one that says when an exchange starts and when it is waited for."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def all_to_all_v(self, space, parts, send_counts, recv_counts, step):
        super().all_to_all_v(space, parts, send_counts, recv_counts, step)
        self.log.append(f"start {step.name}")
        return Waiting(self.log, step.name)


class LoggingMarks(ep_overlap.Marks):
    def __init__(self, log):
        self.log = log

    def stage(self, kind, name):
        if kind != "exchange":
            self.log.append(name)
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def runs():
    """For each contender what happened in one forward and backward, in order, and the gradients."""
    log = []
    contenders = ep_overlap.Contenders(Logging(log), SHAPE, [2], torch.device("cpu"), torch.float32)
    found = {}
    for name, (_, both) in contenders.calls.items():
        log.clear()
        with contenders.marked(LoggingMarks(log)):
            gradients = both()
        found[name] = list(log), gradients
    return found


# what runs beside an exchange, where the overlap is on
BESIDE = {
    "weight gradients": ("weight gradient", "dispatch backward"),
    "router gradients": ("route backward", "dispatch backward"),
    "losses": ("combine", "losses"),
    "packing": ("permute", "counts"),
}


def beside(log, stage, exchange):
    """Whether the stage stands between the exchange's start and the wait for it."""
    return stage in log[log.index(f"start {exchange}") : log.index(f"end {exchange}")]


@pytest.mark.parametrize("overlap", BESIDE)
def test_an_overlap_is_switched_off(runs, overlap):
    assert beside(runs["all on"][0], *BESIDE[overlap])
    assert not beside(runs[f"{overlap} off"][0], *BESIDE[overlap])
    assert not beside(runs["all off"][0], *BESIDE[overlap])
    for other in BESIDE.keys() - {overlap}:
        if (overlap, other) != ("weight gradients", "router gradients"):  # which come after them
            assert beside(runs[f"{overlap} off"][0], *BESIDE[other]), other


def test_the_shared_expert_is_switched_off(monkeypatch):
    """The layer asks for what runs beside, and gets what does not."""
    comm = ep_overlap.Switched(LocalCommunicator())
    asked = ep_overlap.ffmoe_torch.layer
    before = asked.BesideExchanges
    with ep_overlap.without(comm, ["shared expert"]):
        assert asked.BesideExchanges is ep_overlap.NotBeside
    assert asked.BesideExchanges is before
    assert not comm.off


def test_a_shared_expert_on_the_runtime_is_told_of_by_its_parts():
    """As on GPUs: of each of its parts, and not of their stages."""
    log = []
    contenders = ep_overlap.Contenders(Logging(log), SHAPE, [], torch.device("cpu"), torch.float32)
    x = torch.randn(3, 8, requires_grad=True)
    expert = contenders.shared[0]
    with contenders.marked(LoggingMarks(log)):
        output = start_glu(x, expert.w_up, expert.w_down, expert.activation)()
        output.sum().backward()
    assert log == ["shared expert"] * 4
    log.clear()
    start_glu(x, expert.w_up, expert.w_down, expert.activation)()
    assert log == []


def test_every_contender_computes_the_same(runs):
    _, want = runs["all on"]
    for name, (_, gradients) in runs.items():
        same = (
            torch.allclose if name == "2 chunks" else torch.equal
        )  # chunks add an expert's rows in another order
        assert all(map(same, gradients, want)), name


def test_chunks_cross_beside_the_experts(runs):
    log, _ = runs["2 chunks"]
    first, second = (place for place, entry in enumerate(log) if entry == "grouped glu")
    crossed = [place for place, entry in enumerate(log) if entry == "end dispatch"]
    assert crossed[-2] < first < crossed[-1] < second
    sent_home = [place for place, entry in enumerate(log) if entry == "start combine"]
    assert first < sent_home[0] < second


def event(category, name, start, length, thread=1, **arguments):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": length,
        "tid": thread,
        "args": arguments,
    }


def test_a_trace_becomes_lanes():
    mark = "user_annotation"
    events = [
        {"ph": "M", "name": "process_name"},
        {"cat": "kernel", "name": "no times"},
        event("kernel", "times of no sense", "soon", 1),
        event(mark, f"{MARK}exchange|dispatch", 0, 10),
        event("cuda_runtime", "cudaLaunchKernelExC", 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernelExC", 3, 1, correlation=2),
        event(mark, f"{MARK}shared expert|shared expert", 20, 10),
        event("cuda_runtime", "cudaLaunchKernel", 21, 1, correlation=3),
        event(mark, f"{MARK}grouped products|grouped glu", 40, 20),
        event(mark, f"{MARK}sums|combine", 50, 5),
        event("cuda_driver", "cuLaunchKernel", 42, 1, correlation=4),
        event("cuda_driver", "cuLaunchKernel", 51, 1, correlation=5),
        event(mark, f"{MARK}router|gate backward", 60, 5, thread=2),
        event("cuda_driver", "cuLaunchKernel", 42, 1, thread=2, correlation=6),
        event("kernel", "ncclDevKernel_SendRecv", 100, 20, stream=20, correlation=1),
        event("kernel", "ncclDevKernel_SendRecv", 122, 8, stream=20, correlation=2),
        event("kernel", "gemm", 105, 10, stream=30, correlation=3),
        event("kernel", "grouped_glu_sm90", 130, 40, stream=7, correlation=4),
        event("kernel", "combine", 170, 5, stream=7, correlation=5),
        event("kernel", "elementwise", 175, 5, stream=7, correlation=6),
        event("kernel", "route_plan", 180, 5, stream=7),
        event("gpu_memcpy", "Memcpy DtoH", 135, 1, stream=20),
    ]
    assert sorted(timeline.from_trace(events)) == sorted(
        [
            Span(EXCHANGES, "exchange", "dispatch", 0, 30),
            Span(SIDE, "shared expert", "shared expert", 5, 15),
            Span(LAYER, "grouped products", "grouped glu", 30, 70),
            Span(EXCHANGES, "rest", "Memcpy DtoH", 35, 36),
            Span(LAYER, "sums", "combine", 70, 75),
            Span(LAYER, "rest", "elementwise", 75, 80),
            Span(LAYER, "router", "route_plan", 80, 85),
        ]
    )
    assert timeline.from_trace([]) == []


def test_what_ran_beside_an_exchange():
    spans = [Span(EXCHANGES, "exchange", "", 0, 10), Span(EXCHANGES, "exchange", "", 8, 20)]
    spans += [Span(LAYER, "sums", "", 5, 12), Span(SIDE, "sums", "", 11, 13), Span(LAYER, "sums", "", 30, 40)]
    assert timeline.overlapped(spans) == 8


def test_nothing_is_drawn_over_another():
    spans = [
        Span(EXCHANGES, "exchange", name, start, end) for name, start, end in [("long", 0, 2), ("b", 3, 9)]
    ]
    assert [row for row, _ in timeline.rows_of(spans, 1)] == [0, 1]
    assert [row for row, _ in timeline.rows_of(spans, 0.5)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpu", "1,2,3"], "'1,2,3' is not T,H,I,E,K"),
        (["--cpu", "--rounds", "0"], "'0' is not a whole number above 0"),
        (["--cpu", "--chunks", "2,x"], "'x' is not a whole number above 0"),
        (["--cpu", "8,8,4,3,2"], "E=3 is not a multiple of the 2 ranks"),
        (["8,8,4,4,2"], "2 ranks on this machine need a GPU each"),
    ],
)
def test_mistakes_are_said(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["ep_overlap.py", *arguments])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        ep_overlap.parsed()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_it_wants_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ep_overlap.py", "--cpu"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit):
        ep_overlap.parsed()
    assert "start it with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"timelines": {"all on": [[1]]}})])
def test_another_record_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"is no record of benchmarks/ep_overlap\.py"):
        timeline.main([str(path)])
