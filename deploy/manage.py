"""`cancel` and `rm`: ending and removing things, never what a live run needs."""

from collections.abc import Iterator

from penstock.common.errors import Fenced, ObjectMissing, Unavailable, UserError
from penstock.deploy.look import kind_of
from penstock.store.layout import config_key, copy_key, detached_key, reader_key
from penstock.store.objects import ObjectStore, open_store
from penstock.store.retention import detach_reader, readers


def cancel(run_url: str) -> str:
    """End a run with a terminal head; whoever trains it is fenced off and stops."""
    from penstock.store.heads import newest_head
    from penstock.trainer.config import load_run_config
    from penstock.trainer.lineage import TAKEOVER_TRIES, take_over
    from penstock.trainer.load import split_run_url

    runs, run_id = split_run_url(run_url)
    start = load_run_config(runs, run_id).start
    for _ in range(TAKEOVER_TRIES):
        lineage = take_over(runs, run_id, environment={}, start=start)
        if lineage is None:
            ended = newest_head(runs, run_id)
            return f"run {run_id} had ended already: {ended.status if ended else 'unknown'}"
        try:
            head = lineage.end("cancelled", "cancelled by command")
            return f"run {run_id} is cancelled at position {head.position}, step {head.step}"
        except Fenced:
            continue  # a worker took it over in between
    raise Unavailable(f"run {run_id}: workers took it over {TAKEOVER_TRIES} times in between; try again")


def detach(run_url: str) -> str:
    """Let a run's datasets delete what the run has not read yet; the run fails when it meets a gap."""
    from penstock.trainer.config import load_run_config
    from penstock.trainer.load import split_run_url

    runs, run_id = split_run_url(run_url)
    urls = load_run_config(runs, run_id).dataset_urls
    new = [url for url in urls if detach_reader(open_store(url), run_id, "by command")]
    if new:
        return f"run {run_id} is detached: no chunks are kept for it at {', '.join(new)}"
    return f"run {run_id} was detached from {', '.join(urls)} before"


def remove(url: str, really: bool) -> Iterator[str]:
    """Delete a dataset, corpus or run, or say what would be deleted.

    Raises:
        UserError: a run that has not ended needs it.
    """
    store = open_store(url)
    kind = kind_of(store)
    needed_by = list(_live_runs(store, kind))
    if needed_by:
        raise UserError(
            f"{store.url} is needed by {', '.join(needed_by)}, which has not ended; cancel it first"
        )
    objects = list(store.list(""))
    size = sum(size for _, size in objects)
    if not really:
        yield f"would delete {kind} {store.url}: {len(objects)} objects, {size / 1e6:,.1f} MB"
        yield "nothing was deleted; add --yes to delete"
        return
    # what makes it visible goes first, so that an interrupted removal leaves nothing half-usable
    first = "config.json" if kind == "run" else "manifest.json"
    if kind == "run":
        _unregister_reader(store)
    store.delete(first)
    for key, _ in objects:
        store.delete(key)
    yield f"deleted {kind} {store.url}: {len(objects)} objects, {size / 1e6:,.1f} MB"


def _unregister_reader(store: ObjectStore) -> None:
    """A run that is gone reads nothing."""
    from penstock.trainer.config import load_run_config

    base, _, run_id = store.url.rstrip("/").rpartition("/")
    for url in load_run_config(open_store(base), run_id).dataset_urls:
        dataset = open_store(url)
        for key in (reader_key(run_id), detached_key(run_id)):
            dataset.delete(key)
            dataset.delete(copy_key(key))


def _live_runs(store: ObjectStore, kind: str) -> Iterator[str]:
    from penstock.store.heads import newest_head

    if kind == "run":
        base, _, run_id = store.url.rstrip("/").rpartition("/")
        head = newest_head(open_store(base), run_id)
        if head is None or not head.terminal:
            yield f"run {run_id}"
    elif kind == "dataset":
        for reader in readers(store):
            runs = open_store(reader.runs_url)
            try:
                runs.get_record(config_key(reader.run))
            except ObjectMissing:
                continue
            head = newest_head(runs, reader.run)
            if head is None or not head.terminal:
                yield f"run {reader.run}"
