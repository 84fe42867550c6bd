"""Kernels in C, compiled when the package is installed if there is a compiler."""
