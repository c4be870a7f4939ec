"""Measurements on a CUDA machine: ``python perf/run.py``. Not installed."""
