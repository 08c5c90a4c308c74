"""What is wrong with a stored run, and making its checkpoints again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from penstock.common.errors import DataError, PenstockError
from penstock.store.heads import Head, head_numbers, kept_checkpoints, links, newest_head, read_head
from penstock.store.layout import config_key, copy_key
from penstock.store.loader import AsStored, WindowReader
from penstock.store.objects import ObjectStore
from penstock.store.verify import Fault, guarded_faults
from penstock.trainer.config import load_run_config
from penstock.trainer.initial import initial_faults, load_initial
from penstock.trainer.lineage import load_checkpoint
from penstock.trainer.workplace import Workplace, set_up_strict


@dataclass(frozen=True)
class CheckpointFault(Fault):
    """A checkpoint that only training again can bring back."""

    head: Head | None = None


def run_faults(runs: ObjectStore, run_id: str) -> Iterator[Fault]:
    """Check everything of a run: records and their copies, the chain of heads, the checkpoints kept."""
    base = f"{run_id}/"
    keys = [key for key, _ in runs.list(f"{base}heads/")]
    keys += [key for key in (config_key(run_id), copy_key(config_key(run_id))) if runs.exists(key)]
    found = list(guarded_faults(runs, keys))
    yield from found
    if found:
        return  # what they say must be right before the rest can be checked
    try:
        config = load_run_config(runs, run_id)
        yield from initial_faults(runs, run_id, config.initial)
        yield from _chain_faults(runs, run_id)
    except PenstockError as error:
        yield Fault(str(error), "cannot help: the record itself is wrong")


def _chain_faults(runs: ObjectStore, run_id: str) -> Iterator[Fault]:
    numbers = head_numbers(runs, run_id)
    # only those that a head names: others are of workers that died before their head, or were replaced
    histories = (read_head(runs, run_id, n).history for n in sorted(numbers))
    yield from guarded_faults(runs, [f"{run_id}/{history}" for history in histories if history])
    for n in sorted(set(range(max(numbers, default=-1) + 1)) - numbers):
        yield Fault(f"{runs.url}/{run_id}/heads/{n}.json is missing", "cannot help: its copy is gone, too")
    newest = newest_head(runs, run_id)
    for head in kept_checkpoints(runs, run_id, newest):
        for name in head.checkpoint:
            try:
                load_checkpoint(runs, run_id, head, [name])
            except DataError as error:
                yield CheckpointFault(str(error), "trains it again from what is whole", head=head)


def remake_checkpoint(place: Workplace, run_id: str, head: Head) -> None:
    """Train a run again up to a head, and store the checkpoint files that it names where they are damaged.

    Raises:
        DataError: training again gives other bytes; nothing was stored.
    """
    config = load_run_config(place.runs, run_id)
    set_up_strict(config.settings.strict, place)
    data = place.open_data(config)
    group = place.group(config, place.device)
    for link in links(place.runs, run_id, head):
        if link.position < head.position:
            try:
                there = load_checkpoint(place.runs, run_id, link)
            except DataError:
                continue
            group.restore(link, there or load_initial(place.runs, run_id, config.initial))
            break
    reader = WindowReader(data, config.hooks, config.order, AsStored())
    skipped = reader.quarantined()
    while group.position < head.position:
        window = config.order.window(config.order.window_starting_at(group.position))
        chunks = [config.order.chunk_at(position) for position in range(window.start, window.stop)]
        loaded = reader.lay_out(window, [reader.read(chunk) for chunk in chunks if chunk not in skipped])
        group.begin_window(loaded)
        for batch in loaded.batches(config.settings.batch_rows, place.device):
            group.train_step(batch)
        group.end_window(loaded)
    files = group.checkpoint()
    for name, stored in head.checkpoint.items():
        if hashlib.sha256(files.get(name, b"")).hexdigest() != stored.sha256:
            raise DataError(
                f"{place.runs.url}/{run_id}/{stored.key}: training again gives other bytes than were "
                "committed (another machine, or a run that is not strict); nothing was stored"
            )
    for name, stored in head.checkpoint.items():
        try:
            load_checkpoint(place.runs, run_id, head, [name])
        except DataError:
            place.runs.put(f"{run_id}/{stored.key}", files[name])
