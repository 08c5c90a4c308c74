"""summary.json: what a run came to, from its heads, its history and the evaluation."""

from itertools import accumulate
from typing import Any

from penstock.common.errors import UserError
from penstock.store.dataset import Dataset
from penstock.store.heads import Head, chain, newest_head
from penstock.store.joined import JoinedDataset
from penstock.store.objects import ObjectStore
from penstock.trainer.config import RunConfig
from penstock.trainer.lineage import load_history


def last_head(runs: ObjectStore, config: RunConfig) -> Head:
    """The newest head, which must hold a checkpoint."""
    head = newest_head(runs, config.run_id)
    if head is None or not head.checkpoint:
        raise UserError(f"run {config.run_id} has no checkpoint yet; train it first")
    return head


def summarise(
    runs: ObjectStore,
    config: RunConfig,
    data: JoinedDataset,
    evaluation: dict[str, Any] | None,
    evaluate_seconds: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the metric history of a run.

    `loss`, `l0` and `dead_features` of an SAE are those of its last training window, the same that
    /metrics shows; `explained_variance` and `ce_recovered` are on held-out text.

    Args:
        evaluation: as `evaluate` and `evaluate_rows` give it; None if nothing is held out. What it does not
            tell is null.
    """
    evaluation = evaluation or {"saes": {}, "controls": {}}
    head = last_head(runs, config)
    heads = chain(runs, config.run_id, head)
    history = load_history(runs, config.run_id, head)
    made = [_production(part) for part in data.parts]
    chunks = _added_up(made)
    created = heads[-1].time
    settings = config.settings
    waited = sum(point["waited_seconds"] for point in history)
    trained = sum(point["seconds"] for point in history)
    summary = {
        "format": 1,
        "run": config.run_id,
        "status": head.status,
        "created": created,
        "finished": head.time,
        "strict": settings.strict,
        "model": {
            "name": data.parts[0].manifest.source.name,
            "weights_sha256": data.parts[0].manifest.source.weights_sha256,
        },
        "dataset": {
            "rows": sum(part.manifest.total_rows for part in data.parts),
            "chunks": data.n_chunks,
            "bytes": sum(part.n_chunks * part.manifest.chunk_bytes() for part in data.parts),
            "hooks": _hooks(data),
            "context": data.parts[0].manifest.context,
            "corpus": "; ".join(dict.fromkeys(part.manifest.corpus.description for part in data.parts)),
            "parts": [{"url": part.url, "digest": part.manifest.digest} for part in data.parts],
        },
        "training": {
            "batch_rows": settings.batch_rows,
            "window_chunks": settings.window_chunks,
            "epochs": settings.epochs,
            "steps": head.step,
            "rows": head.rows,
            "seed": settings.seed,
            "takeovers": sum(1 for h in heads if h.kind == "takeover" and h.n > 0),
            "head_count": len(heads),
        },
        "saes": [_sae(config, head, sae.name, evaluation) for sae in settings.saes],
        "controls": evaluation["controls"],
        "stages": [
            _harvest_stage(made),
            {
                "name": "train",
                "seconds": trained + waited,
                "rows_per_second": head.rows / (trained + waited) if trained else None,
                "waiting_seconds": waited,
            },
            {"name": "evaluate", "seconds": evaluate_seconds},
        ],
        "timeline": {"start": min([created, *(t for t, _ in chunks)]), "chunks": chunks},
        "environment": head.environment,
    }
    return summary, history


def _sae(config: RunConfig, head: Head, name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    settings = next(sae for sae in config.settings.saes if sae.name == name)
    figures, held_out = head.metrics[name], dict(evaluation["saes"].get(name, {}))
    entry = {
        "name": name,
        "hook_name": settings.hook_name,
        "architecture": settings.architecture,
        "d_in": config.widths[settings.hook_name],
        "d_sae": settings.d_sae,
        "rows": head.rows,
        "steps": head.step,
        "loss": figures["loss"],
        "l0": figures["l0"],
        "dead_features": int(figures["dead_features"]),
        "explained_variance": held_out.get("explained_variance"),
        "ce_recovered": held_out.get("ce_recovered"),
        "density": held_out.pop("density", None),
        "held_out": held_out,
        "weights_sha256": head.checkpoint[f"sae/{name}"].sha256,
    }
    if len(settings.hooks) > 1:
        entry |= {"hook_out": settings.hooks[1], "d_out": config.widths[settings.hooks[1]]}
    for key in ("k", "l1_coefficient", "l0_target", "l0_coefficient"):
        if getattr(settings, key, None) is not None:
            entry[key] = getattr(settings, key)
    return entry


def _production(dataset: Dataset) -> list[tuple[float, int]]:
    """(time, rows) of each commit, from provenance records, oldest first."""
    times: dict[int, float] = {}
    for key, _ in dataset.store.list("provenance/"):
        if key.endswith(".json"):
            record = dataset.store.get_record(key)
            index, when = record["index"], record["time"]
            times[index] = min(when, times.get(index, when))
    commits = sorted(times.items(), key=lambda item: item[1])
    return [(when, dataset.manifest.rows[index]) for index, when in commits]


def _added_up(made: list[list[tuple[float, int]]]) -> list[tuple[float, int]]:
    """(time, rows committed so far) of each commit of any dataset, oldest first."""
    commits = sorted(commit for part in made for commit in part)
    totals = accumulate(rows for _, rows in commits)
    return [(when, total) for (when, _), total in zip(commits, totals, strict=True)]


def _hooks(data: JoinedDataset) -> dict[str, int]:
    """Hook point -> d_in, of those that every dataset holds."""
    shared = set.intersection(*({hook.name for hook in part.manifest.hooks} for part in data.parts))
    return {hook.name: hook.d_in for hook in data.parts[0].manifest.hooks if hook.name in shared}


def _harvest_stage(made: list[list[tuple[float, int]]]) -> dict[str, Any]:
    # datasets may have been made months apart: only the time spent on each counts
    seconds = sum(part[-1][0] - part[0][0] for part in made if part)
    # a first commit's own duration is not recorded, so its rows are left out of the rate
    rows = sum(rows for part in made for _, rows in part[1:])
    return {
        "name": "harvest",
        "seconds": seconds,
        "rows_per_second": rows / seconds if seconds else None,
    }
