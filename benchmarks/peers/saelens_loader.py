"""SAELens's loader of cached activations, one pass per line on standard input.

Run by `benchmarks.loader` with the interpreter of the libraries' own environment. Writes a cache as
SAELens's runner does (a Hugging Face dataset of float32 sequences), then for each line reads one pass of
shuffled batches and prints its seconds.

    python -m benchmarks.peers.saelens_loader
        DIRECTORY SEQUENCES CONTEXT D_IN BATCH_ROWS BUFFER_SEQUENCES THREADS
"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens.hook_points import HookedRootModule

HOOK = "synthetic"


class NoModel(HookedRootModule):  # type: ignore[misc]
    """Cached activations need none."""

    def forward(self) -> None:
        raise NotImplementedError


def write_cache(directory: Path, sequences: int, context: int, d_in: int) -> None:
    features = datasets.Features({HOOK: datasets.Array2D((context, d_in), dtype="float32")})
    generator = torch.Generator().manual_seed(0)

    def rows() -> Iterator[dict[str, Any]]:
        for _ in range(sequences):
            yield {HOOK: torch.randn(context, d_in, generator=generator).numpy()}

    cache = str(directory / "tmp")
    datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).save_to_disk(
        str(directory / "acts")
    )


def main() -> None:
    directory = Path(sys.argv[1])
    sequences, context, d_in, batch_rows, buffer_sequences, threads = map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    write_cache(directory, sequences, context, d_in)
    store = ActivationsStore(
        model=NoModel(),
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=context,
        d_in=d_in,
        n_batches_in_buffer=buffer_sequences,
        total_training_tokens=sequences * context,
        store_batch_size_prompts=32,
        train_batch_size_tokens=batch_rows,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(directory / "acts"),
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(sequences * context // batch_rows):
            next(store)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
