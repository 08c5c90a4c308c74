"""The store: object primitives, corpora, datasets, reading order, loaders and the queue.

`open_dataset(url)` is all a reader needs, and `open_datasets(urls)` where several are read as one; they open
read-only and need neither Redis nor a model.
"""
