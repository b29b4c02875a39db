"""``python -m tests.emulator.routers SOURCES SCHEDULES CASE``: the router's forward, under several schedules.

A case is a test of tests/core/test_routing.py, with all its parameters. SOURCES are in a folder that keeps what is
compiled.
"""

import itertools
import sys

from tests.core import test_routing
from tests.emulator import emulator
from tests.support import NumpyKind

CASES = (
    "test_ties_go_to_the_lower_index",
    "test_logits_that_differ_in_their_last_bits",
    "test_any_number_of_experts",
    "test_every_expert_of_1024_can_be_chosen",
    "test_non_finite_logits_still_choose_real_experts",
    "test_no_valid_token_is_no_loss",
)


def parameters(test):
    """Of every call that pytest would make, as keywords."""
    choices = []
    for mark in getattr(test, "pytestmark", ()):
        names, values = mark.args
        if isinstance(names, str):
            names, values = (names,), [(value,) for value in values]
        choices.append([dict(zip(names, value, strict=True)) for value in values])
    for chosen in itertools.product(*choices):
        yield {name: value for part in chosen for name, value in part.items()}


def main(sources, schedules, case):
    test = getattr(test_routing, case)
    emulator.install(sources)
    for seed in range(int(schedules)):
        emulator.set_seed(seed)
        for keywords in parameters(test):
            test(NumpyKind(), **keywords)


if __name__ == "__main__":
    main(*sys.argv[1:])
