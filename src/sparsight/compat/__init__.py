"""Programs written for other packages run on Sparsight's own parts: one module per package.

Builds on `vision`, `sae` and `evaluation`. `clipscope.py` has the names, signatures and numbers of
the package `clipscope`; new programs should use `load_model` and `SparseAutoencoder`.
"""
