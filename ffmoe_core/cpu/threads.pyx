"""How many threads the CPU backend uses: a setting of the process, as of any OpenMP library."""

import operator
import os
from functools import partial

from ..errors import ConfigError

cdef enum:
    MAX_THREADS = 1024


def _default_threads():
    """OMP_NUM_THREADS (its outermost level) or else the cores this process may run on."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and 1 <= int(first) <= MAX_THREADS:
        return int(first)  # the OpenMP runtime itself warns of a value that is no count
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


cdef int _num_threads = _default_threads()


cdef int num_threads() noexcept nogil:
    return _num_threads


def set_num_threads(n):
    """Use ``n`` threads (1 to 1024) in every later call of the CPU backend. Results do not depend on it.

    Raises ConfigError if ``n`` is not an int from 1 to 1024.
    """
    global _num_threads
    try:
        count = 0 if isinstance(n, bool) else operator.index(n)
    except TypeError:
        count = 0
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(f"num_threads={n!r} must be an int from 1 to {MAX_THREADS}")
    _num_threads = count


if hasattr(os, "register_at_fork"):
    # The child has none of the OpenMP runtime's threads, and the runtime would wait for them for ever.
    os.register_at_fork(after_in_child=partial(set_num_threads, 1))


def get_num_threads():
    """The number of threads the CPU backend uses."""
    return _num_threads
