"""`penstock card`: a Markdown card of a dataset, with a small plot per hook point beside it.

The same dataset gives the same bytes. Nothing of the machine is in it: a local dataset goes by the
name of its directory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from penstock.common.errors import UserError
from penstock.deploy.card_plot import histogram
from penstock.store.dataset import Dataset, open_dataset
from penstock.store.layout import ARRAYS, POSITION, SEQUENCE, TOKENS, TRUTH, acts_array, chunk_key
from penstock.store.manifest import OWN, TOY, Manifest
from penstock.store.statistics import HookStatistics, Statistics, measure_statistics

NOT_STATED = "not stated"


@dataclass(frozen=True)
class Licences:
    """As the user states them; nothing is guessed."""

    dataset: str | None = None
    model: str | None = None
    text: str | None = None


def write_card(url: str, out: Path, licences: Licences) -> list[Path]:
    """Write the card and its plots; returns the files, the card first.

    Raises:
        UserError: nothing is committed yet, or the card cannot be written there.
        DataError: the dataset is damaged.
    """
    dataset = open_dataset(url)
    statistics = measure_statistics(dataset)
    if not statistics.rows:
        raise UserError(f"{dataset.url} has no rows yet; a card needs some")
    folder = Path(f"{out.stem}_plots")
    plots = {hook.name: folder / f"{_file_name(hook.name)}.svg" for hook in statistics.hooks}
    if not statistics.sampled_rows:
        plots = {}
    text = "\n".join(_card(dataset, statistics, licences, plots)) + "\n"
    contents = {out: text} | {
        out.parent / plots[hook.name]: histogram(hook) for hook in statistics.hooks if hook.name in plots
    }
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
    return list(contents)


def _file_name(hook: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", hook)


def shown_url(url: str) -> str:
    """A remote URL as it is; of a local path only the last part."""
    return url if _is_remote(url) else Path(urlsplit(url).path or url).name


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def _card(
    dataset: Dataset, statistics: Statistics, licences: Licences, plots: dict[str, Path]
) -> Iterator[str]:
    manifest = dataset.manifest
    title = _TITLES.get(manifest.source.kind, "Activations of {}").format(_cell(manifest.source.name))
    yield from _front_matter(title, statistics.rows, licences)
    yield f"# {title}"
    yield ""
    made = _MADE.get(manifest.source.kind, "what the language model {} computes for each token of {}")
    yield (
        f"{statistics.rows:,} rows at {len(manifest.hooks)} hook points: "
        f"{made.format(_cell(manifest.source.name), _cell(manifest.corpus.description))}. "
        "Made with Penstock; readable by anything that reads Zarr v3."
    )
    yield ""
    yield from _facts(dataset, statistics, licences)
    yield from _hook_table(manifest, statistics)
    yield from _plots(statistics, plots)
    yield from _arrays(manifest)
    yield from _how_to_open(shown_url(dataset.url), manifest, statistics)
    yield from _limits(manifest, statistics)


_TITLES = {TOY: "Toy activations"}
_MADE = {
    TOY: f"{{1}}. Rows are sparse sums of known features, which are in `{TRUTH}`",
    OWN: "made by {}; {}",
}


def _front_matter(title: str, rows: int, licences: Licences) -> Iterator[str]:
    """As the dataset cards of the Hugging Face hub have it."""
    yield "---"
    yield f"license: {_quoted(licences.dataset) if licences.dataset else 'unknown'}"
    yield f"pretty_name: {_quoted(title)}"
    yield "tags: [activations, interpretability, sparse-autoencoders, zarr, penstock]"
    yield f"size_categories: [{_quoted(_size_category(rows))}]"
    yield "viewer: false"
    yield "---"
    yield ""


def _quoted(text: str) -> str:
    """A YAML string, double-quoted."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _size_category(rows: int) -> str:
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    if rows < 1000:
        return "n<1K"
    power = len(str(rows)) - 1 - 3
    return f"{names[power]}<n<{names[power + 1]}" if power + 1 < len(names) else "n>1T"


def _facts(dataset: Dataset, statistics: Statistics, licences: Licences) -> Iterator[str]:
    manifest = dataset.manifest
    yield "| | |"
    yield "|---|---|"
    origin = _text_facts if manifest.of_text else _other_facts
    for name, value in {
        "dataset": f"`{shown_url(dataset.url)}`",
        "digest of its manifest": f"`{manifest.digest}`",
        "licence": licences.dataset or NOT_STATED,
        **origin(manifest, licences),
        "rows": f"{statistics.rows:,} of {manifest.total_rows:,} planned",
        "chunks": f"{statistics.chunks:,} of {manifest.n_chunks:,}, up to {manifest.rows_per_chunk:,} rows",
        "size": f"{statistics.stored_bytes / 1e6:,.1f} MB",
        "values": f"bfloat16, codec `{manifest.codec}`, format version {manifest.format_version}",
        **_numerics_facts(manifest),
        "retention": manifest.retention,
    }.items():
        yield f"| {name} | {_cell(value)} |"
    yield ""


def _text_facts(manifest: Manifest, licences: Licences) -> dict[str, str]:
    source, corpus = manifest.source, manifest.corpus
    return {
        "model": f"{source.name}, revision {source.revision or NOT_STATED}",
        "digest of its weights": f"`{source.weights_sha256}`",
        "licence of the model": licences.model or NOT_STATED,
        "text": corpus.description,
        "licence of the text": licences.text or NOT_STATED,
        "digest of the corpus": f"`{corpus.digest}`",
        "digest of the tokenizer": f"`{corpus.tokenizer_sha256}`",
        "sequences": f"{corpus.n_sequences:,} of {corpus.context:,} tokens, BOS {corpus.bos}",
        "left out": "rows of special tokens" if source.drop_special else "nothing",
        "held out": f"documents with {corpus.held_out_rule}",
    }


def _other_facts(manifest: Manifest, licences: Licences) -> dict[str, str]:
    source, corpus = manifest.source, manifest.corpus
    what = "ground truth" if source.kind == TOY else "its name and version"
    return {
        "made by": f"{source.name}, version {source.revision or NOT_STATED}",
        f"digest of the {what}": f"`{source.weights_sha256}`",
        "rows that belong together": f"{corpus.context:,}",
        **({"licence of the model": licences.model} if licences.model else {}),
        "held out": corpus.held_out_rule,
    }


def _numerics_facts(manifest: Manifest) -> dict[str, str]:
    numerics = manifest.numerics
    if not manifest.of_text:
        return {"computed with": numerics.libraries}
    return {
        "computed with": f"{numerics.compute_dtype}, {numerics.attention} attention, torch {numerics.torch}, "
        f"{numerics.libraries}, threads {numerics.threads}, {numerics.device}"
    }


def _cell(text: str) -> str:
    """Text that stays within its table cell and is no markup of its own."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _hook_table(manifest: Manifest, statistics: Statistics) -> Iterator[str]:
    yield "## Hook points"
    yield ""
    yield "| hook point | d_in | MB | mean norm | RMS | largest value | dead | constant |"
    yield "|---|---|---|---|---|---|---|---|"
    for hook in statistics.hooks:
        megabytes = 2 * hook.d_in * manifest.total_rows / 1e6
        sampled = statistics.sampled_rows > 0
        counted = [f"{n} ({n / hook.d_in:.1%})" if sampled else "–" for n in (hook.dead, hook.constant)]
        yield (
            f"| `{hook.name}` | {hook.d_in} | {megabytes:,.1f} | {hook.mean_norm:.4g} | {hook.rms:.4g} | "
            f"{hook.max_abs:.4g} | {' | '.join(counted)} |"
        )
    yield ""
    yield (
        "Norms are Euclidean, RMS is per value; both and the largest absolute value are over all rows. "
        "*Dead* dimensions are 0 and *constant* ones have one other value in every row of a sample of "
        f"{statistics.sampled_rows:,}. MB are those of all planned rows, uncompressed."
    )
    yield ""


def _plots(statistics: Statistics, plots: dict[str, Path]) -> Iterator[str]:
    for hook in statistics.hooks:
        if hook.name in plots:
            yield f"![{_alt(hook)}]({plots[hook.name].as_posix()})"
    if plots:
        yield ""


def _alt(hook: HookStatistics) -> str:
    fullest = int(hook.counts.argmax())
    return (
        f"Norms of rows at {hook.name}: from 0 to {hook.edges[-1]:.3g}, most between "
        f"{hook.edges[fullest]:.3g} and {hook.edges[fullest + 1]:.3g}"
    )


def _arrays(manifest: Manifest) -> Iterator[str]:
    total = manifest.n_chunks * manifest.rows_per_chunk
    yield "## Arrays"
    yield ""
    yield f"Zarr v3 below `{ARRAYS}/`, all {total:,} long, in chunks of {manifest.rows_per_chunk:,} rows."
    yield ""
    yield "| array | type | |"
    yield "|---|---|---|"
    yield f"| `{acts_array('<hook point>')}` | bfloat16, two dimensions | activations |"
    text = manifest.of_text
    token = "the row's token id" if text else "0"
    yield f"| `{TOKENS}` | int32 | {token} |"
    of = "corpus sequence" if text else "sequence"
    yield f"| `{SEQUENCE}` | int64 | the {of} it is from; −1 marks unused rows at a chunk's end |"
    yield f"| `{POSITION}` | int32 | its place in that sequence |"
    yield ""
    yield (
        f"Rows are permuted within each chunk{', and sequences over the whole corpus' if text else ''}. "
        "A chunk counts only if `commits/` has a record of it: one that does not exist reads as zeros "
        "through any Zarr reader."
    )
    yield ""


def _how_to_open(place: str, manifest: Manifest, statistics: Statistics) -> Iterator[str]:
    hook = manifest.hooks[0]
    whole = statistics.chunks == manifest.n_chunks and manifest.retention == "keep"
    there, rows = statistics.first, manifest.rows_per_chunk
    array = f"{place}/{ARRAYS}/{acts_array(hook.name)}"
    yield "## How to open it"
    yield ""
    yield f"With Penstock, checked{' and shuffled' if whole else ''}:"
    yield ""
    yield "```python"
    yield "from penstock.store.dataset import open_dataset"
    yield ""
    yield f'dataset = open_dataset("{place}")'
    if whole:
        yield f'for batch in dataset.batches(["{hook.name}"], batch_rows=4096):'
        yield f'    rows = batch["{hook.name}"]  # torch.bfloat16 [up to 4096, {hook.d_in}]'
    else:
        yield f'chunk = dataset.read_chunk({there}, ["{hook.name}"])'
        yield f'rows = chunk.acts["{hook.name}"]  # numpy, bfloat16 [up to {rows}, {hook.d_in}]'
    yield "```"
    yield ""
    yield "Without it, with TensorStore:"
    yield ""
    yield "```python"
    yield "import tensorstore as ts"
    yield ""
    yield f"kvstore = {_kvstore(array)}"
    yield 'acts = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()'
    yield f"chunk = acts[{there * rows}:{there * rows + rows}].read().result()  # numpy, bfloat16"
    yield "```"
    yield ""
    if manifest.codec == "bytes+crc32c":
        yield "Or with NumPy and ml_dtypes, one chunk at a time (its last 4 bytes are a checksum):"
        yield ""
        yield "```python"
        if _is_remote(place):
            yield "import fsspec"
        yield "import ml_dtypes"
        yield "import numpy as np"
        yield ""
        opened = "fsspec.open" if _is_remote(place) else "open"
        key = chunk_key(f"{place}/{ARRAYS}", acts_array(hook.name), there, 2)
        yield f'with {opened}("{key}", "rb") as file:'
        yield f"    chunk = np.frombuffer(file.read()[:-4], ml_dtypes.bfloat16).reshape(-1, {hook.d_in})"
        yield "```"
        yield ""


def _kvstore(array: str) -> str:
    if array.startswith("s3://"):
        bucket, _, path = array.removeprefix("s3://").partition("/")
        return f'{{"driver": "s3", "bucket": "{bucket}", "path": "{path}/"}}'
    return f'{{"driver": "file", "path": "{array}/"}}'


def _limits(manifest: Manifest, statistics: Statistics) -> Iterator[str]:
    yield "## What to know"
    yield ""
    if manifest.of_text:
        yield (
            "- Activations are derived from the model and the text: the licences of both may say what may be "
            "done with them."
        )
        yield (
            "- Where a row's document was cut, its context begins in the middle of a text; a sequence may "
            "hold parts of several documents."
        )
    yield (
        "- Values are rounded to bfloat16. What their bits depend on is listed above"
        + ("; another machine may give other last bits." if manifest.source.kind != TOY else ".")
    )
    if statistics.chunks < manifest.n_chunks:
        yield f"- This dataset is not complete: {statistics.chunks:,} of {manifest.n_chunks:,} chunks exist."
    if manifest.retention == "window":
        yield "- Chunks are deleted once they were read (retention: window); what is left is not all of it."
