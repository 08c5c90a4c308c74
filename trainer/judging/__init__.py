"""Dictionaries judged inside the language model: what they break, where, and by which features."""
