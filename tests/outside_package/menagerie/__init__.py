"""What a package outside Sparsight adds to it: a checkpoint format, an image source, a verb."""
