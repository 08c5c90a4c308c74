"""What a producer of all hook points holds in memory: run as a process of its own, prints one JSON line.

python -m services.held_memory REDIS_URL DIRECTORY MEMORY_BYTES
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from penstock.common.memory import keep_freed_memory
from penstock.common.model.language_model import LanguageModel
from penstock.common.redis import RedisSettings, connect
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.producer.memory import store_threads
from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.producer.source import LanguageModelSource
from penstock.store.chunks import Chunk
from penstock.store.corpus import Corpus
from penstock.store.manifest import Manifest
from penstock.store.objects import open_store
from services.lm import shipped_model, shipped_tokenizer, write_text
from services.producing import CountingSource, Producer

HOOKS = ["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post", "blocks.*.hook_attn_out"]
CONTEXT = 256


class Capture(CountingSource):
    """Real activations in place of synthetic ones."""

    def __init__(self, manifest: Manifest, corpus: Corpus, model: LanguageModel) -> None:
        super().__init__(manifest)
        self._capture = LanguageModelSource(manifest, corpus, model)

    def chunk(self, index: int) -> Chunk:
        return self._capture.chunk(index)


def _status(field: str) -> int:
    """Bytes that the kernel counts for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _peak(work: Callable[[], None]) -> int:
    """The most memory that this process has while it does something."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    work()
    return _status("VmHWM")


def main() -> None:
    keep_freed_memory()
    redis_url, directory, memory = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    text = CorpusSettings(
        url=str(directory / "corpus"),
        text="files",
        files=[write_text(directory / "text", documents=150)],
        context=CONTEXT,
    )
    corpus = ensure_corpus(text, shipped_tokenizer(), lambda done, wanted: None)
    settings = DatasetSettings(hooks=HOOKS, memory_bytes=memory)
    model = shipped_model()
    manifest = plan_dataset(settings, corpus, model)
    threads = store_threads(manifest.chunk_bytes(), manifest.largest_object_bytes(), memory)
    tokens = torch.from_numpy(corpus.tokens(0, settings.sequences_per_forward)).long()
    producer = Producer(
        connect(RedisSettings(url=redis_url)),
        "memory",
        directory / "dataset",
        "one",
        source=Capture(manifest, corpus, model),
        manifest=manifest,
        pool=ThreadPoolExecutor(threads),
    )
    forward = _peak(
        lambda: model.capture(tokens, [hook.name for hook in manifest.hooks], lambda name, acts: None)
    )
    held = _peak(producer.run) - forward
    stored = sum(size for _, size in open_store(str(directory / "dataset")).list("activations.zarr/acts/"))
    print(
        json.dumps(
            {
                "held": held,
                "threads": threads,
                "chunk": manifest.chunk_bytes(),
                "chunks": manifest.n_chunks,
                "hooks": len(manifest.hooks),
                "stored": stored,
            }
        )
    )


if __name__ == "__main__":
    main()
