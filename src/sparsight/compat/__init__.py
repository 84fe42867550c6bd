"""Programs written for other packages, on Sparsight's own parts: one module a package.

Builds on `vision`, `sae` and `evaluation`. `clipscope.py` has the names, signatures and numbers of
the package `clipscope`; new programs use `load_model` and `SparseAutoencoder` instead.
"""
