"""Keys of all objects, in one place. docs/protocol.md is the normative description."""

FORMAT_VERSION = 1
"""Format of datasets, corpora and runs written by this version."""

MANIFEST = "manifest.json"
ARRAYS = "activations.zarr"
CORPUS_ARRAYS = "corpus.zarr"
DOCUMENTS = "documents.json"
TRUTH, TRUTH_COPY = "truth.safetensors", "truth.copy"
TOKENS, SEQUENCE, POSITION = "tokens", "sequence", "position"
ACTS = "acts/"
COMMITS, INDEX = "commits/", "index/"
BLOCK_CHUNKS = 1000
"""Chunks whose commits lie in one folder, and in one index block once all are there."""


def acts_array(hook_name: str) -> str:
    """Path of a hook point's array inside the Zarr group."""
    return f"{ACTS}{hook_name}"


def chunk_key(group: str, array: str, index: int, ndim: int) -> str:
    """Zarr v3 default chunk key of the chunk that holds rows [index·R, (index+1)·R) of an array."""
    return f"{group}/{array}/c/{index}" + "/0" * (ndim - 1)


def commit_folder(block: int) -> str:
    return f"commits/{block}/"


def commit_key(index: int) -> str:
    return f"{commit_folder(index // BLOCK_CHUNKS)}{index}.json"


def index_key(block: int) -> str:
    return f"{INDEX}{block}.safetensors"


def block_range(block: int, n_chunks: int) -> range:
    """The chunks of a block, of which the dataset's last may be shorter."""
    return range(block * BLOCK_CHUNKS, min((block + 1) * BLOCK_CHUNKS, n_chunks))


def provenance_key(index: int, writer: str) -> str:
    return f"provenance/{index}-{writer}.json"


def reader_key(run_id: str) -> str:
    return f"readers/{run_id}.json"


def detached_key(run_id: str) -> str:
    return f"detached/{run_id}.json"


def floor_key(n: int) -> str:
    return f"floor/{n}.json"


def quarantine_key(index: int) -> str:
    return f"quarantine/{index}.json"


def copy_key(key: str) -> str:
    """Where the copy of a record lies that nothing else could tell again."""
    return key.removesuffix(".json") + ".copy"


def config_key(run_id: str) -> str:
    return f"{run_id}/config.json"


def head_key(run_id: str, n: int) -> str:
    return f"{run_id}/heads/{n}.json"


def history_key(run_id: str, n: int, writer: str) -> str:
    return f"{run_id}/history/{n}-{writer}.json"


def initial_key(run_id: str, sae: str) -> str:
    """The weights that an SAE starts from, if they were imported."""
    return f"{run_id}/initial/{sae}.safetensors"


def initial_copy_key(run_id: str, sae: str) -> str:
    return f"{run_id}/initial/{sae}.copy"


def checkpoint_prefix(run_id: str, n: int, writer: str) -> str:
    return f"{run_id}/checkpoints/{n}-{writer}/"
