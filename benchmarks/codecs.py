"""Codecs for stored activations: how small, and how fast to encode and decode.

Chunks are real: made by `LanguageModelSource` from the standard library's sources, at the middle layer's
residual stream, MLP activations and attention output. Each codec ends in a crc32c, as stored objects do,
and must give the very bits back. Contenders take turns within a round, on one thread; figures are medians
over chunks and rounds. `plain` is what is stored by default.

    python -m benchmarks.codecs                    # the model that ships
    python -m benchmarks.codecs --model DIRECTORY  # another one
    python -m benchmarks.codecs --read             # also whole datasets through Dataset.batches

pcodec takes part if the package is installed.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import google_crc32c
import numcodecs
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measure import Work, take_turns
from penstock.common.model.files import ModelSettings, find_model, load_tokenizer
from penstock.common.model.language_model import LanguageModel
from penstock.producer.corpus import CorpusSettings, ensure_corpus
from penstock.producer.plan import DatasetSettings, plan_dataset
from penstock.producer.source import LanguageModelSource
from penstock.store.arrays import BLOSC, BLOSC_BLOCK, PLAIN, decode_payload, encode_payload
from penstock.store.chunks import Chunk
from penstock.store.corpus import Corpus
from penstock.store.dataset import Dataset
from penstock.store.manifest import Manifest
from penstock.store.objects import open_store
from penstock.store.writer import DatasetWriter

SEQUENCES, CONTEXT, CHUNKS = 64, 256, 3
READ_CHUNKS = 8
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Codec:
    """Stored bytes of 16-bit values, and the values again."""

    encode: Callable[[Bits], bytes]
    decode: Callable[[bytes], npt.NDArray[np.uint8]]


def codecs() -> dict[str, Codec]:
    """By name; `blosc … one block` has a single block, the others blosc's own block size."""
    found = {
        "plain": _stored(PLAIN),
        "stored blosc": _stored(BLOSC),
        "zstd 1": _checked(numcodecs.Zstd(1)),
        "zstd 3": _checked(numcodecs.Zstd(3)),
    }
    for name, level in (("lz4", 5), ("zstd", 1), ("zstd", 3)):
        for shuffle, word in ((1, "bytes"), (2, "bits")):
            for block, size in ((0, "own blocks"), (BLOSC_BLOCK, "one block")):
                codec = numcodecs.Blosc(name, level, shuffle, block, typesize=2)
                found[f"blosc {name} {level}, {word}, {size}"] = _checked(codec)
    try:
        from numcodecs.pcodec import PCodec
    except ImportError:
        return found
    for level in (4, 8):
        found[f"pcodec {level}"] = _checked(PCodec(level=level))
    return found


def _stored(codec: str) -> Codec:
    def decode(data: bytes, n: int) -> npt.NDArray[np.uint8]:
        return decode_payload(data, np.dtype(np.uint16), (n,), "chunk", codec).view(np.uint8)

    size: list[int] = []

    def encode(values: Bits) -> bytes:
        size[:] = [values.size]
        return encode_payload(values.reshape(-1), codec)

    return Codec(encode, lambda data: decode(data, size[0]))


def _checked(codec: "numcodecs.abc.Codec") -> Codec:
    def encode(values: Bits) -> bytes:
        data = bytes(codec.encode(values.reshape(-1)))
        return data + int(google_crc32c.value(data)).to_bytes(4, "little")

    def decode(data: bytes) -> npt.NDArray[np.uint8]:
        if int(google_crc32c.value(data[:-4])) != int.from_bytes(data[-4:], "little"):
            raise RuntimeError("the checksum does not match")
        return np.frombuffer(codec.decode(data[:-4]), np.uint8)

    return Codec(encode, decode)


def compare(chunks: list[Bits], rounds: int) -> Iterator[str]:
    """A table over one hook point's chunks."""
    contenders = codecs()
    sizes: dict[str, list[float]] = {name: [] for name in contenders}
    encoding: dict[str, list[float]] = {name: [] for name in contenders}
    decoding: dict[str, list[float]] = {name: [] for name in contenders}
    for chunk in chunks:
        stored = {name: codec.encode(chunk) for name, codec in contenders.items()}
        for name, codec in contenders.items():
            if not np.array_equal(codec.decode(stored[name]), chunk.reshape(-1).view(np.uint8)):
                raise RuntimeError(f"{name} does not give the values back")
            sizes[name].append(len(stored[name]) / chunk.nbytes)
        write: dict[str, Work] = {name: partial(codec.encode, chunk) for name, codec in contenders.items()}
        read: dict[str, Work] = {
            name: partial(codec.decode, stored[name]) for name, codec in contenders.items()
        }
        for took, work in ((encoding, write), (decoding, read)):
            for name, seconds in take_turns(work, rounds, torch.device("cpu")).items():
                took[name] += [chunk.nbytes / one / 1e6 for one in seconds]
    yield f"  {'':<32}{'size':>7}{'encode':>9}{'decode':>9}  MB/s of values"
    for name in contenders:
        shares, speeds = sizes[name], (encoding[name], decoding[name])
        yield f"  {name:<32}{statistics.median(shares):>7.3f}" + "".join(
            f"{statistics.median(speed):>9,.0f}" for speed in speeds
        )
    best = sum(entropy(chunk) for chunk in chunks) / len(chunks) / 16
    yield f"  {'entropy of single values':<32}{best:>7.3f}"


def entropy(values: Bits) -> float:
    """Bits per value that a code of single values needs at least."""
    share = np.bincount(values.reshape(-1), minlength=1) / values.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def hooks_of(model: LanguageModel) -> list[str]:
    """Residual stream, MLP activations and attention output of the middle layer, as far as there are any."""
    names = model.hook_names()
    layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    middle = f"blocks.{len(layers) // 2}"
    groups = (
        ("hook_resid_post", "hook_out"),
        ("mlp.hook_post", "mlp.out.hook_in"),
        ("hook_attn_out", "attn.hook_out"),
    )
    found = [
        next((f"{middle}.{name}" for name in group if f"{middle}.{name}" in names), None) for group in groups
    ]
    return [name for name in found if name is not None]


def prepare(name: str, directory: Path, chunks: int) -> tuple[Manifest, LanguageModelSource]:
    settings = ModelSettings(name=name)
    files = find_model(settings)
    tokenizer = load_tokenizer(files)
    corpus: Corpus = ensure_corpus(
        CorpusSettings(
            url=str(directory / "corpus"),
            context=CONTEXT,
            bos="prepend" if tokenizer.bos_id is not None else "none",
            max_tokens=(chunks + 1) * SEQUENCES * CONTEXT,
            max_held_out_tokens=CONTEXT,
        ),
        tokenizer,
        lambda done, wanted: None,
    )
    model = LanguageModel(files, settings)
    manifest = plan_dataset(
        DatasetSettings(hooks=hooks_of(model), sequences_per_chunk=SEQUENCES, max_rows=None), corpus, model
    )
    return manifest, LanguageModelSource(manifest, corpus, model)


def compare_reading(manifest: Manifest, chunks: list[Chunk], directory: Path, rounds: int) -> Iterator[str]:
    """Whole datasets in both codecs through the loader, from the page cache."""
    manifest = manifest.model_copy(update={"rows": [chunk.rows for chunk in chunks]})
    work: dict[str, Work] = {}
    for codec in (PLAIN, BLOSC):
        store = open_store(str(directory / codec))
        planned = manifest.model_copy(update={"codec": codec})
        writer = DatasetWriter(store, planned)
        for chunk in chunks:
            writer.write(chunk.index, chunk)
        writer.close()
        work[codec] = partial(_read_all, Dataset(store, planned))
    seconds = take_turns(work, rounds, torch.device("cpu"))
    for codec, took in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[PLAIN], took, strict=True))
        rate = manifest.total_rows / statistics.median(took)
        yield f"  Dataset.batches, {codec:<20}{rate:>12,.0f} rows/s, {ratio:.2f} of plain"


def _read_all(dataset: Dataset) -> None:
    hooks = [hook.name for hook in dataset.manifest.hooks]
    for batch in dataset.batches(hooks, batch_rows=4096, window_chunks=4):
        for acts in batch.values():
            acts.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=ModelSettings().name, help="model directory or name")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per chunk")
    parser.add_argument("--read", action="store_true", help="also read whole datasets in both codecs")
    args = parser.parse_args()
    numcodecs.blosc.use_threads = False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as directory:
        n = READ_CHUNKS if args.read else CHUNKS
        manifest, source = prepare(args.model, Path(directory), n)
        chunks = [source.chunk(index) for index in range(n)]
        for hook in manifest.hooks:
            print(f"\n{manifest.source.name}, {hook.name}, d_in {hook.d_in}, {CHUNKS} chunks", flush=True)
            values = [
                np.ascontiguousarray(chunk.acts[hook.name]).view(np.uint16) for chunk in chunks[:CHUNKS]
            ]
            for line in compare(values, args.rounds):
                print(line, flush=True)
        if args.read:
            print(f"\n{manifest.source.name}, {len(manifest.hooks)} hook points, {n} chunks")
            for line in compare_reading(manifest, chunks, Path(directory), 2 * args.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
