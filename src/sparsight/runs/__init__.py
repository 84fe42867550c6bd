"""Work that outlives its process: folders that one process claims, checkpoints, orderly stops.

Every room that trains builds on it. `folder.py` knows who may write into a folder and what a killed
process left there, `same_run.py` whether what is there belongs to this run, `checkpoint_files.py`
how a checkpoint is written and found again, `loop.py` when one is written.
"""
