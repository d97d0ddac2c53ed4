"""The kernels themselves; `launch.py` says with which tiles they run."""
