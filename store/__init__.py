"""The store: object primitives, corpora, datasets, reading order, loaders and the queue.

`open_dataset(url)` is all a reader needs; it opens read-only and needs neither Redis nor a model.
"""
