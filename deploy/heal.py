"""`verify` and `repair`: finding what is damaged, and putting it right."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError, DataError
from penstock.deploy.config import Config
from penstock.deploy.look import kind_of
from penstock.deploy.processes import open_source
from penstock.store.objects import ObjectStore, open_store
from penstock.store.verify import Fault, corpus_faults, dataset_faults, manifest_faults

if TYPE_CHECKING:
    from penstock.trainer.workplace import Workplace

Say = Callable[[str], None]


def faults(url: str, on_checked: Callable[[], None] = lambda: None) -> tuple[str, Iterator[Fault]]:
    """What lies at a URL, and what is wrong with it.

    Raises:
        UserError: nothing of ours lies there.
    """
    store = open_store(url)
    kind = kind_of(store)
    return f"{kind} {store.url}", _FAULTS[kind](store, on_checked)


def _corpus(store: ObjectStore, on_checked: Callable[[], None]) -> Iterator[Fault]:
    from penstock.store.corpus import open_corpus

    found = list(manifest_faults(store))
    yield from found
    if not any("manifest.json" in fault.problem for fault in found):
        yield from corpus_faults(open_corpus(store.url), lambda key: on_checked())


def _dataset(store: ObjectStore, on_checked: Callable[[], None]) -> Iterator[Fault]:
    from penstock.store.dataset import open_dataset

    found = list(manifest_faults(store))
    yield from found
    if not any("manifest.json" in fault.problem for fault in found):
        yield from dataset_faults(open_dataset(store.url), lambda index: on_checked())


def _run(store: ObjectStore, on_checked: Callable[[], None]) -> Iterator[Fault]:
    from penstock.trainer.verify import run_faults

    base, _, run_id = store.url.rpartition("/")
    for fault in run_faults(open_store(base), run_id):
        yield fault
        on_checked()


_FAULTS: dict[str, Callable[[ObjectStore, Callable[[], None]], Iterator[Fault]]] = {
    "corpus": _corpus,
    "dataset": _dataset,
    "run": _run,
}


class Repair:
    """Puts right what is damaged in the corpus, the datasets and the runs of a config.

    Args:
        say: told, line by line, what is done and what could not be.
    """

    def __init__(self, config: Config, say: Say) -> None:
        self.left = 0
        """Faults that could not be put right."""
        self._config = config
        self._say = say

    def everything(self) -> None:
        """Corpus first, because chunks are made from it; runs last, because they are trained on chunks."""
        self._heal(self._config.corpus.url, self._repack)
        for url in self._config.dataset_urls():
            self._heal(url, partial(self._make_chunks, url))
        runs = open_store(self._config.runs_url)
        for run_id in sorted({key.split("/")[0] for key, _ in runs.list("") if "/config." in key}):
            self._heal(f"{runs.url}/{run_id}", partial(self._train_again, runs, run_id))

    def _heal(self, url: str, remake: Callable[[list[Fault]], None]) -> None:
        """Restore what can be restored, then make the rest again."""
        if not any(open_store(url).exists(name) for name in _MARKS):
            return
        found = self._restore(url)
        if found:
            try:
                remake(found)
            except (DataError, ConfigError) as error:
                self._say(str(error))
            found = self._restore(url)
        for fault in found:
            self._say(f"not repaired: {fault}")
        self.left += len(found)

    def _restore(self, url: str) -> list[Fault]:
        """Restore what the store itself can tell, as long as that uncovers more; what is left."""
        found = self._look(url)
        while any(fault.restore for fault in found):
            for fault in found:
                if fault.restore:
                    fault.restore()
                    self._say(f"{fault.problem}: restored")
            found = self._look(url)
        return found

    def _look(self, url: str) -> list[Fault]:
        return list(faults(url)[1])

    def _repack(self, found: list[Fault]) -> None:
        from penstock.common.model.files import find_model, load_tokenizer
        from penstock.producer.corpus import repack_corpus

        tokenizer = load_tokenizer(find_model(self._config.model))
        count = repack_corpus(self._config.corpus, tokenizer, lambda done, wanted: None)
        self._say(f"{self._config.corpus.url}: {count} objects packed again")

    def _make_chunks(self, url: str, found: list[Fault]) -> None:
        from penstock.store.manifest import OWN, load_manifest
        from penstock.store.writer import DatasetWriter

        chunks = sorted({fault.chunk for fault in found if fault.chunk is not None})
        if not chunks:
            return
        store = open_store(url)
        there = load_manifest(store)
        if there.source.kind == OWN:
            raise ConfigError(
                f"{url}: only what stored its rows can make them again: store_rows(…, check=True)"
            )
        plan, make_source = open_source(self._config)
        if url != self._config.dataset.url:
            # an earlier part, which a run reads besides: model and corpus are all that its chunks follow from
            if (there.source, there.corpus.digest) != (plan.source, plan.corpus.digest):
                raise ConfigError(
                    f"{url} was made from another model or corpus: call `penstock repair` with the config "
                    "that it was made with"
                )
            plan = there
        writer = DatasetWriter(store, plan)
        source = make_source(writer.manifest, lambda: None)
        for index in chunks:
            whole = writer.mend(index, source.chunk(index))
            self._say(
                f"chunk {index}: made again"
                if whole
                else f"chunk {index}: made again, and not what was committed"
            )
        writer.close()

    def _train_again(self, runs: ObjectStore, run_id: str, found: list[Fault]) -> None:
        from penstock.trainer.verify import CheckpointFault, remake_checkpoint

        heads = {f.head.n: f.head for f in found if isinstance(f, CheckpointFault) and f.head is not None}
        for n in sorted(heads):
            remake_checkpoint(self._place(runs), run_id, heads[n])
            self._say(f"run {run_id}: checkpoint of head {n} trained again")

    def _place(self, runs: ObjectStore) -> "Workplace":
        from penstock.common.device import open_device
        from penstock.trainer.workplace import Workplace

        trainer = self._config.trainer
        nothing: Any = None  # repairs need no queue
        return Workplace(
            runs=runs,
            client=nothing,
            redis=self._config.redis,
            worker="repair",
            device=open_device(trainer.device, "trainer.device"),
            threads=trainer.threads,
            port=-1,
        )


_MARKS = ("manifest.json", "manifest.copy", "config.json", "config.copy")
