"""Runs that start from imported dictionaries: what a run pins of them, and its own copy of them.

The run keeps the weights file, byte for byte, and pins its SHA-256: wherever a worker starts the run, and
wherever the directory was that they came from, the first step starts from the same weights.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError, DamagedObject, DataError, UserError
from penstock.common.settings import Settings
from penstock.store.layout import initial_copy_key, initial_key
from penstock.store.objects import ObjectStore
from penstock.store.verify import Fault
from penstock.trainer.exchange.names import CONFIG, WEIGHTS
from penstock.trainer.kinds import SAESettings

if TYPE_CHECKING:
    # what is read with torch is imported where it is used: most runs start from nothing
    from penstock.trainer.exchange.read import Source
    from penstock.trainer.sae import SAE


class InitialWeights(Settings):
    """A dictionary that an SAE starts from."""

    sha256: str
    """Of the weights file."""
    size: int
    """Bytes of the weights file."""
    fields: dict[str, Any]
    """Its cfg.json, without metadata and device."""


def pin_initial(settings: SAESettings, widths: dict[str, int]) -> InitialWeights | None:
    """What a run pins of the dictionary that an SAE starts from, if it starts from one.

    Args:
        widths: of each hook point.

    Raises:
        ConfigError: it is not there, or not one that the SAE can start from.
    """
    if settings.init_from is None:
        return None
    folder = Path(settings.init_from).expanduser()
    stamps = [_stamp(folder / name) for name in (CONFIG, WEIGHTS)]
    shape = [widths[hook] for hook in settings.hooks]
    key = f"{folder.absolute()} {stamps} {shape} {settings.model_dump_json()}"
    if key not in _PINS:
        _PINS[key] = _pin(settings, widths)
    return _PINS[key]


_PINS: dict[str, InitialWeights] = {}
"""What was pinned before, while the files' stamps stay: a run's id is asked for again and again."""


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _pin(settings: SAESettings, widths: dict[str, int]) -> InitialWeights:
    source = _read(settings)
    pinned = InitialWeights(
        sha256=hashlib.sha256(source.weights).hexdigest(), size=len(source.weights), fields=source.fields
    )
    _make_start(settings, widths, source)
    return pinned


def _read(settings: SAESettings) -> "Source":
    from penstock.trainer.exchange.read import read_saelens

    try:
        return read_saelens(settings.init_from or "")
    except UserError as error:
        raise ConfigError(f"saes: {settings.name}: init_from: {error}") from error


def _make_start(settings: SAESettings, widths: dict[str, int], source: "Source") -> "SAE":
    from penstock.trainer.exchange.read import assemble

    where = f"saes: {settings.name}: init_from"
    try:
        sae = assemble(source.fields, source.weights, str(settings.init_from))
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from error
    there = {"architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "d_out": sae.d_out}
    there |= {name: getattr(sae.settings, name) for name in sae.settled}
    here: dict[str, Any] = {"architecture": settings.architecture, "d_sae": settings.d_sae}
    here |= {"d_in": widths[settings.hook_name], "d_out": widths[settings.hooks[-1]]}
    here |= {name: getattr(settings, name, None) for name in sae.settled}
    for name, value in there.items():
        if here[name] != value:
            raise ConfigError(f"{where}: {settings.init_from} has {name} {value}, but the SAE {here[name]}")
    if settings.decoder_bias == "none" and sae.b_dec.any():
        raise ConfigError(f"{where}: {settings.init_from} has a b_dec, but decoder_bias is none")
    try:
        return sae.normalise_decoder()
    except ValueError as error:
        raise ConfigError(f"{where}: {settings.init_from} cannot be trained on: {error}") from error


def store_initial(
    runs: ObjectStore, run_id: str, saes: Iterable[SAESettings], initial: dict[str, InitialWeights]
) -> None:
    """Store a run's own copies of what it starts from.

    Raises:
        ConfigError: a directory holds something else by now.
    """
    for settings in saes:
        if settings.name not in initial:
            continue
        weights = _read(settings).weights
        if not _is(weights, initial[settings.name]):
            raise ConfigError(
                f"saes: {settings.name}: init_from: {settings.init_from} was changed meanwhile; try again"
            )
        runs.put(initial_copy_key(run_id, settings.name), weights)
        runs.put(initial_key(run_id, settings.name), weights)


def load_initial(runs: ObjectStore, run_id: str, initial: dict[str, InitialWeights]) -> dict[str, bytes]:
    """Weights files that a run starts from, as `initial/<SAE>`, each checked.

    Raises:
        DamagedObject, ObjectMissing
    """
    return {f"initial/{name}": _load(runs, initial_key(run_id, name), pin) for name, pin in initial.items()}


def starting_points(
    saes: Iterable[SAESettings],
    widths: dict[str, int],
    initial: dict[str, InitialWeights],
    files: dict[str, bytes],
) -> "dict[str, SAE]":
    """SAE name -> module that it starts from: takes raw rows; rows of its W_dec have unit norm.

    Args:
        widths: of each hook point.
        files: as `load_initial` gives them.
    """
    from penstock.trainer.exchange.read import Source

    made = {}
    for settings in saes:
        if pin := initial.get(settings.name):
            source = Source(pin.fields, files[f"initial/{settings.name}"], settings.name, settings.hook_name)
            made[settings.name] = _make_start(settings, widths, source)
    return made


def initial_faults(runs: ObjectStore, run_id: str, initial: dict[str, InitialWeights]) -> Iterator[Fault]:
    """Check what a run starts from and its copy, each against the run's pin."""
    for name, pin in initial.items():
        keys = (initial_key(run_id, name), initial_copy_key(run_id, name))
        whole: dict[str, bytes] = {}
        problems: dict[str, str] = {}
        for key in keys:
            try:
                whole[key] = _load(runs, key, pin)
            except DataError as error:
                problems[key] = str(error)
        for key, problem in problems.items():
            if not whole:
                yield Fault(problem, "cannot help: its copy is gone, too")
                continue
            data = next(iter(whole.values()))
            yield Fault(problem, "restores it from its copy", partial(runs.put, key, data))


def _load(runs: ObjectStore, key: str, pin: InitialWeights) -> bytes:
    data = runs.get(key)
    if not _is(data, pin):
        raise DamagedObject(f"{runs.url}/{key} is damaged")
    return data


def _is(data: bytes, pin: InitialWeights) -> bool:
    return len(data) == pin.size and hashlib.sha256(data).hexdigest() == pin.sha256
