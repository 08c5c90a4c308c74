"""The error tree, split by what the caller can do.

    PenstockError
    ├── UserError           something given is wrong; change it and call again   (exit code 2)
    │   ├── ConfigError     a setting, named by its path
    │   ├── PlanMismatch    a URL already holds something made to another plan
    │   ├── ModelError      a language model or hook point
    │   ├── StoreError      an object store that cannot be used as it is
    │   └── OtherFormat     a record of a format version that this version does not read
    ├── Unavailable         a service did not answer after bounded retries       (exit code 2)
    ├── DataError           stored bytes are not what their record says          (exit code 1)
    │   ├── ObjectMissing
    │   ├── DamagedObject
    │   └── Detached        a run may no longer read its dataset
    ├── Fenced              another worker has taken this run over; stop         (exit code 1)
    └── RunFailed           a run has ended without success                      (exit code 1)
        └── Diverged        its training went non-finite

Every message is one line that names the field or object and what to do about it.
"""

import difflib
from collections.abc import Iterable


class PenstockError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UserError(PenstockError):
    """What the user gave is wrong; nothing was lost."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class PlanMismatch(UserError):
    """A URL already holds a dataset, corpus or run made to another plan."""


class OtherFormat(UserError):
    """A record has a format version that this version of penstock does not read."""


class ModelError(UserError):
    """A language model cannot be loaded, lacks a hook point or differs from the manifest."""


class StoreError(UserError):
    """An object store is unreachable, refuses access or lacks exclusive create."""


class Unavailable(PenstockError):
    """A service did not answer after bounded retries."""

    exit_code = 2


class DataError(PenstockError):
    """Stored bytes are not what their record says. They are never used."""


class ObjectMissing(DataError):
    """An object that a record names is not there."""


class DamagedObject(DataError):
    """An object's bytes fail their checksum or do not parse."""


class Fenced(PenstockError):
    """Another worker owns the run now; what this one did since its last head is discarded."""


class Detached(DataError):
    """A run was detached from its dataset, whose chunks may be gone."""


class RunFailed(PenstockError):
    """A run has ended without success; its last head stays."""


class Diverged(RunFailed):
    """A loss turned non-finite."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """' Did you mean a, b?' for the names closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
