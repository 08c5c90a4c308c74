"""Benchmarks: each hot path against the limit that the hardware or a library sets for it, in one run.

`python -m benchmarks` from the repository's root; README.md says how to read what it prints.
"""
