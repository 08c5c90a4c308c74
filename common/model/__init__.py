"""Language models: where they are found, loading, capturing activations, splicing them.

transformer-lens takes seconds to import, so it is imported only when a model is loaded.
"""
