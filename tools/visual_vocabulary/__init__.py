"""Makes the visual vocabulary, `src/sparsight/naming/data/visual.tsv`."""
