"""One dataset, as the store has it: what is planned, committed, given up, and still to be made."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.common.errors import ObjectMissing, PenstockError, StoreError, Unavailable
from penstock.deploy.config import Config
from penstock.store.dataset import Dataset
from penstock.store.manifest import OWN, Manifest, load_manifest
from penstock.store.objects import ObjectStore
from penstock.store.retention import Retention, budget_chunks


@dataclass(frozen=True)
class DatasetNow:
    """A dataset at one look.

    Attributes:
        planned, rows: chunks and rows of its plan; None and 0 before there is one.
        committed, committed_rows: those that exist.
        quarantined: chunks given up.
        wanted: chunks that a producer could make now; None where this config makes nothing, and where
            a reader cannot be asked what it needs.
        blocked: for whom chunks are not made although some are missing.
        problem: why nothing more is known.
        claims: chunk -> who makes it; None where Redis does not say.
        repairs: chunks asked to be made again.
        rows_per_second, seconds_left: None where they are not known.
    """

    url: str
    planned: int | None = None
    committed: int = 0
    rows: int = 0
    committed_rows: int = 0
    quarantined: int = 0
    wanted: int | None = None
    blocked: str | None = None
    problem: str | None = None
    claims: dict[int, str] | None = None
    repairs: int = 0
    rows_per_second: float | None = None
    seconds_left: float | None = None


@dataclass
class Seen:
    """What is remembered of a dataset between looks."""

    dataset: Dataset
    digest: str
    rows: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[chunks] which are committed."""


def look_at_dataset(
    store: ObjectStore, config: Config, made_here: bool, known: dict[str, Seen]
) -> DatasetNow:
    """Look at one dataset; what is remembered of it goes to `known`, by URL.

    Args:
        made_here: it is the one that the config's producers make.

    Raises:
        PenstockError: the store refuses us, or the manifest is damaged or of a newer format.
    """
    url = store.url
    seen = known.get(url)
    try:
        manifest = load_manifest(store)
    except ObjectMissing:
        known.pop(url, None)
        may_be_made = made_here and (config.toy is not None or config.producers > 0)
        return DatasetNow(url, wanted=int(may_be_made) if made_here else None)
    # a new manifest is another dataset: somebody removed the one before
    if seen is None or seen.dataset.manifest != manifest:
        seen = known[url] = Seen(Dataset(store, manifest), manifest.digest, np.array(manifest.rows, np.int64))
    if not (len(seen.mask) and seen.mask.all()):
        mask = np.zeros(manifest.n_chunks, np.bool_)
        mask[list(seen.dataset.committed())] = True
        seen.mask = mask
    wanted, blocked = _to_make(config, seen) if made_here else (None, None)
    return DatasetNow(
        url,
        planned=manifest.n_chunks,
        committed=int(seen.mask.sum()),
        rows=int(seen.rows.sum()),
        committed_rows=int(seen.rows[seen.mask].sum()),
        quarantined=len(seen.dataset.quarantined()),
        wanted=wanted,
        blocked=blocked,
    )


def _to_make(config: Config, seen: Seen) -> tuple[int | None, str | None]:
    """How many missing chunks may be made now, and if none may, for whom they wait.

    None where that cannot be asked: autoscaling must not take that for nothing to do.
    """
    missing = np.flatnonzero(~seen.mask)
    manifest = seen.dataset.manifest
    if not len(missing) or manifest.source.kind == OWN:
        return 0, None
    try:
        limit, waiting_for = _limit(config, seen.dataset, manifest)
    except (Unavailable, StoreError) as error:
        return None, str(error)
    except PenstockError as error:
        return 0, str(error)
    may = int((missing < limit).sum())
    return may, None if may else waiting_for


def _limit(config: Config, dataset: Dataset, manifest: Manifest) -> tuple[int, str]:
    # where the producers' next look would put the floor: there may be none of them just now
    retention = Retention(dataset.store, manifest, budget_chunks(manifest, config.dataset.budget_bytes))
    retention.look()
    return retention.limit, retention.waiting_for
