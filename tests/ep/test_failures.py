"""A rank that dies, hangs or raises makes every other raise CommError within the deadline, with its name."""

import json
import os
import socket
import sys
import time

import pytest

from tests.ep.launch import Launch, start

TIMEOUT = 3.0
START_SECONDS = 60.0  # for the ranks to start, on a busy machine
SLACK = 2.0  # for the scheduler: more ranks than cores
STEPS = {"forward": "combine", "backward": "weights backward", "between": "counts"}
# 50 is what a release must stand: FFMOE_FAILURE_ROUNDS=50
ROUNDS = int(os.environ.get("FFMOE_FAILURE_ROUNDS", "1"))


def wait_for(paths, seconds):
    """Whether all the files are there within so many seconds."""
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def exit_code(folder, rank):
    """How a rank's process ended, or None where it does not."""
    path = folder / f"{(folder / f'{rank}.pid').read_text()}.rc"
    return int(path.read_text()) if wait_for([path], START_SECONDS) else None


def check_reports(folder, others, victim, how, where):
    """Every other rank named the victim, the step and the layer, in time."""
    for rank in others:
        report = json.loads((folder / f"{rank}.json").read_text())
        assert report["ranks"] == [victim], (rank, report)
        assert report["layer"] == "blocks.3.moe"
        assert report["step"] == STEPS[where]
        assert f"rank {victim}" in report["message"]
        assert "blocks.3.moe" in report["message"]
        assert report["seconds"] < TIMEOUT + SLACK, report
        if how == "raise":
            assert "RuntimeError: out of luck" in report["message"]
            assert report["seconds"] < SLACK, "was not told, but waited"
        else:
            assert "no sign of" in report["message"]


@pytest.mark.parametrize("where", STEPS)
@pytest.mark.parametrize("how", ["kill", "stop", "raise"])
@pytest.mark.parametrize(("size", "victim"), [(2, 0), (3, 1)])
@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_others_name_the_missing_rank(tmp_path, round_number, how, where, size, victim):
    command = ("-m", "tests.ep.failing", tmp_path, how, where, victim, TIMEOUT)
    process = start(size, "-m", "tests.ep.shelter", tmp_path, *command)
    others = [rank for rank in range(size) if rank != victim]
    try:
        all_raised = wait_for([tmp_path / f"{rank}.json" for rank in others], START_SECONDS)
        codes = [exit_code(tmp_path, rank) for rank in others] if all_raised else []
    finally:
        process.stop()
        output, _ = process.finish(START_SECONDS)
    assert all_raised, f"not every rank raised CommError:\n{output}"
    assert codes == [1] * len(others), output
    check_reports(tmp_path, others, victim, how, where)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_nobody_waits_for_the_store(tmp_path, monkeypatch, how):
    """Of the rank that holds it the others can't tell each other anything, but they end in time."""
    monkeypatch.setenv("FFMOE_STORE", f"tcp://127.0.0.1:{free_port()}")
    outputs, reports = over_gloo(tmp_path, how, "forward", 0)
    assert set(reports) == {1, 2}, outputs
    for report in reports.values():
        assert 0 in report["ranks"], report
        assert report["seconds"] < TIMEOUT + SLACK, report


@pytest.mark.parametrize(("how", "where"), [("kill", "forward"), ("stop", "backward"), ("raise", "between")])
def test_others_name_the_missing_rank_over_gloo(tmp_path, how, where):
    outputs, reports = over_gloo(tmp_path, how, where, 1)
    assert set(reports) == {0, 2}, outputs
    check_reports(tmp_path, (0, 2), 1, how, where)


def over_gloo(tmp_path, how, where, victim):
    """What three ranks printed, and the reports of the others, who have ended."""
    size = 3
    others = [rank for rank in range(size) if rank != victim]
    ranks = []
    for rank in range(size):
        command = ("-m", "tests.ep.failing", tmp_path, how, where, victim, TIMEOUT, rank, size)
        ranks.append(Launch(sys.executable, *command))
    try:
        all_raised = wait_for([tmp_path / f"{rank}.json" for rank in others], START_SECONDS)
        if all_raised:
            codes = [ranks[rank].wait(START_SECONDS) for rank in others]
    finally:
        for rank in ranks:
            rank.stop()
        outputs = "\n".join(rank.communicate()[0] for rank in ranks)
    assert all_raised, f"not every rank raised CommError:\n{outputs}"
    assert codes == [1] * len(others), outputs
    return outputs, {rank: json.loads((tmp_path / f"{rank}.json").read_text()) for rank in others}
