"""The stages on the CPU: Cython, OpenMP and the BLAS that SciPy brings."""
