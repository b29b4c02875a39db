"""Matrix products of row-major matrices through the BLAS that SciPy brings."""

from libc.stdint cimport int64_t
from scipy.linalg.cython_blas cimport dgemm, sgemm

ctypedef fused real:
    float
    double

cdef enum:
    # OpenBLAS multiplies up to 100^3 (for some operands less) without packing either matrix first, and
    # packing is most of the work for few rows: 8 x 512 x 1024 in such pieces runs three times as fast.
    SMALL_DIM = 32
    SMALL_PRODUCT = 1 << 19


cdef int enter_single_threaded() except -1
cdef int leave_single_threaded() except -1


cdef inline void _call(
    bint transpose_a, bint transpose_b, int m, int n, int k,
    real alpha, real* a, int lda, real* b, int ldb, real beta, real* c, int ldc,
) noexcept nogil:
    # BLAS is column-major: there a row-major C = A B reads C^T = B^T A^T
    cdef char* ta = "T" if transpose_a else "N"
    cdef char* tb = "T" if transpose_b else "N"
    if real is float:
        sgemm(tb, ta, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc)
    else:
        dgemm(tb, ta, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc)


cdef inline void gemm(
    bint transpose_a, bint transpose_b, int m, int n, int k,
    real alpha, real* a, int lda, real* b, int ldb, real beta, real* c, int ldc,
) noexcept nogil:
    """C[m, n] = alpha op(A)[m, k] op(B)[k, n] + beta C, all row-major with leading dimensions lda, ldb, ldc.

    Small products are cut where the pieces of B, or else of C, are whole rows.
    """
    cdef int step, start = 0
    if k <= SMALL_DIM:
        step = max(16, SMALL_PRODUCT // (<int64_t>n * k))
        while start < m:
            _call(
                transpose_a, transpose_b, min(step, m - start), n, k,
                alpha, a + (start if transpose_a else <int64_t>start * lda), lda, b, ldb,
                beta, c + <int64_t>start * ldc, ldc,
            )
            start += step
    elif m > SMALL_DIM:
        _call(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
    elif transpose_b:
        step = max(16, SMALL_PRODUCT // (<int64_t>m * k))
        while start < n:
            _call(
                transpose_a, True, m, min(step, n - start), k, alpha, a, lda, b + <int64_t>start * ldb, ldb,
                beta, c + start, ldc,
            )
            start += step
    else:
        step = max(16, SMALL_PRODUCT // (<int64_t>m * n))
        while start < k:
            _call(
                transpose_a, False, m, n, min(step, k - start),
                alpha, a + (<int64_t>start * lda if transpose_a else start), lda, b + <int64_t>start * ldb, ldb,
                beta if start == 0 else 1, c, ldc,
            )
            start += step
