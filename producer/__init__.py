"""Producers: text to tokens to activations to committed chunks."""
