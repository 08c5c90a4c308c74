"""Trained SAEs for use: `load_sae(run_url, name)` in a notebook, without Redis."""

import safetensors.torch
from torch import Tensor

from penstock.common.errors import ObjectMissing, UserError, nearest
from penstock.store.heads import Head, newest_head
from penstock.store.layout import config_key, copy_key
from penstock.store.objects import ObjectStore, open_store
from penstock.trainer.config import RunConfig, load_run_config
from penstock.trainer.exchange.read import load_saelens
from penstock.trainer.lineage import load_checkpoint
from penstock.trainer.sae import SAE, build

__all__ = ["load_sae", "load_saelens", "load_saes", "split_run_url"]


def load_sae(run_url: str, name: str) -> SAE:
    """A run's SAE as its newest head has it, taking raw activations.

    Args:
        run_url: `<runs url>/<run id>`.
        name: of the SAE within the run.

    Returns:
        A module with `encode` ([B, D] → [B, S]), `decode` ([B, S] → [B, D]) and `settings`. The input
        scale is folded into its weights; rows of W_dec have norm 1/scale.

    Raises:
        UserError: there is no such run, or it has no such SAE or no checkpoint yet.
        ObjectMissing, DamagedObject: it is damaged.
    """
    runs, run_id = split_run_url(run_url)
    config = load_run_config(runs, run_id)
    head = newest_head(runs, run_id)
    return load_saes(runs, config, head, [name])[name]


def load_saes(
    runs: ObjectStore, config: RunConfig, head: Head | None, names: list[str] | None = None
) -> dict[str, SAE]:
    """Several SAEs of a head by name (all by default), scale folded, in evaluation mode."""
    settings = {sae.name: sae for sae in config.settings.saes}
    if head is None or not head.checkpoint:
        raise UserError(f"run {config.run_id} has no checkpoint yet; train it first")
    wanted = list(settings) if names is None else names
    for name in wanted:
        if name not in settings:
            raise UserError(
                f"run {config.run_id} has no SAE {name!r}.{nearest(name, settings)} It has "
                f"{', '.join(settings)}."
            )
    files = load_checkpoint(runs, config.run_id, head, [f"sae/{name}" for name in wanted])
    loaded = {}
    for name in wanted:
        loaded[name] = inference_sae(config, name, safetensors.torch.load(files[f"sae/{name}"]))
    return loaded


def inference_sae(config: RunConfig, name: str, weights: dict[str, Tensor]) -> SAE:
    """An SAE of a run from its weights as checkpoints hold them, scale folded, in evaluation mode."""
    own = next(sae for sae in config.settings.saes if sae.name == name)
    parameters = {key: value for key, value in weights.items() if key not in ("scale", "scale_out")}
    scale = float(weights["scale"])
    sae = build(config.widths[own.hook_name], own, config.widths[own.hooks[-1]])
    sae.load_state_dict(parameters)
    sae.fold_scale(scale, float(weights.get("scale_out", weights["scale"])))
    return sae.eval().requires_grad_(False)


def split_run_url(run_url: str) -> tuple[ObjectStore, str]:
    """The runs store and run id of `<runs url>/<run id>`.

    Raises:
        UserError: no run is there.
        ObjectMissing: its config is gone; a copy of it is there.
    """
    base, _, run_id = run_url.rstrip("/").rpartition("/")
    runs = open_store(base or ".")
    if not run_id or not runs.exists(config_key(run_id)):
        if run_id and runs.exists(copy_key(config_key(run_id))):
            raise ObjectMissing(f"{run_url} has lost its config.json")
        raise UserError(f"{run_url} is not a run: it has no config.json; check the URL")
    return runs, run_id
