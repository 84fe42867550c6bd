"""Work that outlives its process: folders that one process claims, checkpoints, orderly stops.

Stands under every room that trains. `folder.py` holds who may write into a folder and what a
killed process left there, `same_run.py` whether what lies there is a part of this run,
`checkpoint_files.py` how a checkpoint is written and found again, `loop.py` when one is written.
"""
