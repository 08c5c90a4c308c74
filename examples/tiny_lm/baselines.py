"""What a model must beat: unigram and interpolated bigram models of the same tokens.

Both are counted on the training stream and scored on packed held-out sequences [n, context], in
nats per token, over every token but the first of each sequence.
"""

import numpy as np


def unigram(stream: np.ndarray, packed: np.ndarray, vocabulary: int) -> float:
    """Add-one smoothed unigram."""
    p = _unigram_probabilities(stream, vocabulary)
    return float(-np.log(p[packed[:, 1:]]).mean())


def interpolated_bigram(stream: np.ndarray, packed: np.ndarray, vocabulary: int) -> float:
    """Bigram with Witten-Bell interpolation to the unigram: the weight of the bigram in a context
    grows with how often the context was seen and falls with how many followers it had."""
    p = _unigram_probabilities(stream, vocabulary)
    pairs = stream[:-1] * vocabulary + stream[1:]
    keys, counts = np.unique(pairs, return_counts=True)
    context_total = np.bincount(stream[:-1], minlength=vocabulary)
    followers = np.bincount(keys // vocabulary, minlength=vocabulary)
    weight = context_total / np.maximum(1, context_total + followers)

    before, after = packed[:, :-1].ravel(), packed[:, 1:].ravel()
    wanted = before * vocabulary + after
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[at] == wanted, counts[at], 0)
    bigram = seen / np.maximum(1, context_total[before])
    mixed = weight[before] * bigram + (1 - weight[before]) * p[after]
    return float(-np.log(mixed).mean())


def _unigram_probabilities(stream: np.ndarray, vocabulary: int) -> np.ndarray:
    counts = np.bincount(stream, minlength=vocabulary) + 1
    return counts / counts.sum()
