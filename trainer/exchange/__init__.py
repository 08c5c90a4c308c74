"""Dictionaries to and from other libraries: one directory per SAE, in the library's own files.

What a kind of SAE is called there and which tensors it has is beside the kind, in `trainer/sae/`; here are
the files. docs/export.md says which kinds there are in which format.
"""
