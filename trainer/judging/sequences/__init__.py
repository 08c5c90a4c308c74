"""Experiments on sequences of text: overview, by position, error propagation."""
