"""Keeping the BLAS single-threaded while our own threads call it.

Our threads split the work into products that do not depend on how many threads there are; a BLAS that split
them again would oversubscribe the cores, and its result would depend on the split.
"""

import ctypes

from libc.stdint cimport uintptr_t

from scipy.linalg import cython_blas

ctypedef void (*SetThreads)(int) noexcept nogil
ctypedef int (*GetThreads)() noexcept nogil

cdef SetThreads _set_threads = NULL
cdef GetThreads _get_threads = NULL


cdef void _find_controls():
    """OpenBLAS's thread count controls, under the names its builds give them.

    They are looked up in the extension that links to it, which finds them in whichever library SciPy was
    built against. Other libraries run single-threaded by themselves inside an OpenMP region (MKL, BLIS) and
    need no control.
    """
    global _set_threads, _get_threads
    library = ctypes.CDLL(cython_blas.__file__)
    for prefix in ("scipy_openblas", "openblas"):
        if hasattr(library, f"{prefix}_set_num_threads"):
            setter = getattr(library, f"{prefix}_set_num_threads")
            getter = getattr(library, f"{prefix}_get_num_threads")
            _set_threads = <SetThreads><uintptr_t>ctypes.cast(setter, ctypes.c_void_p).value
            _get_threads = <GetThreads><uintptr_t>ctypes.cast(getter, ctypes.c_void_p).value
            return


_find_controls()

# Calls from several Python threads overlap: the first in saves the user's setting, the last out restores it.
# Only touched while holding the GIL.
cdef int _users = 0
cdef int _saved = 1


cdef int enter_single_threaded() except -1:
    """Every product until the matching ``leave_single_threaded`` runs in the thread that asks for it."""
    global _users, _saved
    if _set_threads != NULL and _users == 0:
        _saved = _get_threads()
        _set_threads(1)
    _users += 1
    return 0


cdef int leave_single_threaded() except -1:
    global _users
    _users -= 1
    if _set_threads != NULL and _users == 0:
        _set_threads(_saved)
    return 0
