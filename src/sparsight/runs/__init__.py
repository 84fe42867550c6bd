"""Work that outlives its process: checkpoints, written whole and checked when read.

Stands under every room that trains.
"""
