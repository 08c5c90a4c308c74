"""Exports: `export_sae` for a module, `export_run` for a run's newest head."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from penstock.common.errors import PenstockError, UserError
from penstock.common.logs import LOGGER
from penstock.store.heads import newest_head
from penstock.trainer.config import RunConfig, load_run_config, open_pinned
from penstock.trainer.exchange import dictionary_learning, saelens, sparsify
from penstock.trainer.exchange.origin import Origin
from penstock.trainer.load import load_saes, split_run_url
from penstock.trainer.sae import SAE

Files = dict[str, bytes]

FORMATS: dict[str, Callable[[SAE, Origin], Files]] = {
    "saelens": saelens.files,
    "dictionary-learning": dictionary_learning.files,
    "sparsify": sparsify.files,
}
"""Format -> what gives an export's files by name."""


def export_run(run_url: str, format: str, out: Path, names: list[str] | None = None) -> Iterator[Path]:
    """Export SAEs of a run's newest head, each to a directory of its name below `out`.

    Args:
        names: of the SAEs; None means all.

    Yields:
        Each directory, once it is written.

    Raises:
        UserError: no such SAE, no checkpoint yet, a kind that the format does not have, or a directory
            that is there already. Nothing was written then.
        ObjectMissing, DamagedObject: no such run, or it is damaged.
    """
    runs, run_id = split_run_url(run_url)
    config = load_run_config(runs, run_id)
    saes = load_saes(runs, config, newest_head(runs, run_id), names)
    exports = {out / name: _files(sae, format, origin_of(config, name)) for name, sae in saes.items()}
    for directory in exports:
        _refuse_to_overwrite(directory)
    for directory, files in exports.items():
        _write(directory, files)
        yield directory


def export_sae(sae: SAE, directory: str | Path, format: str, origin: Origin | None = None) -> Path:
    """Export a module, such as `load_sae` and `load_saelens` give, to a directory that does not exist yet.

    Args:
        format: `saelens`, `dictionary-learning` or `sparsify`.
        origin: what to say about where it comes from; its name and hook point by default.

    Raises:
        UserError: the format does not have this kind, the directory is there already, or the module takes
            scaled rows.
    """
    directory = Path(directory)
    origin = origin or Origin(sae.settings.name, sae.settings.hook_name)
    files = _files(sae, format, origin)
    _refuse_to_overwrite(directory)
    _write(directory, files)
    return directory


def origin_of(config: RunConfig, name: str) -> Origin:
    """What is known of a run's SAE: without its dataset, only what the run itself says."""
    hook_name = next(sae.hook_name for sae in config.settings.saes if sae.name == name)
    pin = config.datasets[0]
    told = Origin(
        name,
        hook_name,
        run_id=config.run_id,
        model=pin.source,
        weights_sha256=pin.weights_sha256,
        corpus_digest=pin.corpus_digest,
    )
    try:
        manifest = open_pinned(config).parts[0].manifest
    except PenstockError as error:
        LOGGER.warning("context length and corpus are left out of the export: %s", error)
        return told
    return replace(
        told,
        revision=manifest.source.revision,
        context=manifest.context,
        bos=manifest.corpus.bos == "prepend",
        drop_special=manifest.source.drop_special,
        corpus=manifest.corpus.description,
    )


def _files(sae: SAE, format: str, origin: Origin) -> Files:
    if format not in FORMATS:
        raise UserError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    if sae.folded_scale is None:
        raise UserError(
            f"SAE {origin.sae}: takes scaled rows, which other libraries know nothing of; call fold_scale "
            "first, or export what load_sae gives"
        )
    try:
        return FORMATS[format](sae, origin)
    except UserError as error:
        raise UserError(f"SAE {origin.sae}: {error}; choose others, or another format") from error


def _refuse_to_overwrite(directory: Path) -> None:
    if directory.exists() or directory.is_symlink():
        raise UserError(f"{directory} is there already; remove it, or choose another directory")


def _write(directory: Path, files: Files) -> None:
    """Under another name first, so that a directory of that name is always whole."""
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=directory.parent))
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
