"""`inspect`: looking without touching."""

from collections.abc import Iterator

from penstock.common.errors import DataError, ObjectMissing, UserError
from penstock.store.layout import MANIFEST, copy_key
from penstock.store.manifest import TOY
from penstock.store.objects import ObjectStore, open_store


def kind_of(store: ObjectStore) -> str:
    """`dataset`, `corpus` or `run`, as far as its record or the copy of it can tell.

    Raises:
        UserError: none of them.
    """
    if store.exists("config.json") or store.exists("config.copy"):
        return "run"
    fault: DataError | None = None
    for key in (MANIFEST, copy_key(MANIFEST)):
        try:
            return "corpus" if "blocks" in store.get_record(key) else "dataset"
        except ObjectMissing:
            continue
        except DataError as error:
            fault = error
    raise fault or UserError(f"{store.url} is neither a dataset, a corpus nor a run; check the URL")


def describe(url: str) -> Iterator[str]:
    """What lies at a URL."""
    store = open_store(url)
    kind = kind_of(store)
    yield f"{kind} {store.url}"
    if kind == "corpus":
        from penstock.store.corpus import open_corpus

        manifest = open_corpus(url).manifest
        yield f"  {manifest.description}, {manifest.n_documents} documents"
        yield f"  {manifest.n_sequences} sequences of {manifest.context}, {manifest.n_held_out} held out"
        yield f"  BOS {manifest.bos}, special ids {manifest.special_ids}, seed {manifest.seed}"
        yield f"  digest {manifest.digest}"
    elif kind == "dataset":
        yield from _describe_dataset(url)
    else:
        yield from _describe_run(url)


def _describe_dataset(url: str) -> Iterator[str]:
    from penstock.store.dataset import open_dataset

    dataset = open_dataset(url)
    manifest = dataset.manifest
    committed = dataset.committed()
    moments, chunks = dataset.moments()
    yield f"  {len(committed)} of {manifest.n_chunks} chunks committed, {manifest.total_rows:,} rows planned"
    source = manifest.source
    if manifest.of_text:
        yield f"  model {source.name}, weights {source.weights_sha256[:12]}"
    else:
        what = "ground truth" if source.kind == TOY else f"version {source.revision}, digest"
        yield f"  rows of {source.name}, {what} {source.weights_sha256[:12]}"
    for hook in manifest.hooks:
        line = f"  {hook.name}: d_in {hook.d_in}, {2 * hook.d_in * manifest.total_rows / 1e6:,.0f} MB"
        if hook.name in moments:
            m = moments[hook.name]
            line += f", mean norm {m.mean_norm:.3g}, largest value {m.max_abs:.3g} over {chunks} chunks"
        yield line
    corpus = manifest.corpus
    yield f"  corpus {corpus.description}, digest {corpus.digest[:12]}"
    yield f"  sequences {corpus.first_sequence} to {corpus.end - 1} of it"
    yield f"  numerics {manifest.numerics.model_dump()}"
    yield f"  digest {manifest.digest}"


def _describe_run(url: str) -> Iterator[str]:
    from penstock.store.heads import chain, newest_head
    from penstock.trainer.config import load_run_config
    from penstock.trainer.load import split_run_url

    runs, run_id = split_run_url(url)
    config = load_run_config(runs, run_id)
    for pin in config.datasets:
        yield f"  dataset {pin.url}, {sum(pin.rows):,} rows"
    yield f"  {config.total_rows():,} rows over {config.settings.epochs} epochs"
    head = newest_head(runs, run_id)
    for link in reversed(chain(runs, run_id, head)):
        reason = f", {link.reason}" if link.reason else ""
        where = f"position {link.position}, step {link.step}"
        yield f"  head {link.n}: {link.kind}, {link.status}, {where}{reason}"
    for name, stored in head.checkpoint.items() if head else ():
        if name.startswith("sae/"):
            yield f"  {name.removeprefix('sae/')}: weights {stored.sha256}"


def hook_points(model: str) -> Iterator[str]:
    """Every hook point of a model."""
    from penstock.common.model.files import ModelSettings, find_model
    from penstock.common.model.language_model import LanguageModel

    settings = ModelSettings(name=model)
    yield from LanguageModel(find_model(settings), settings).hook_names()
