"""summary.json: what a run came to, from its heads, its history and the evaluation."""

from typing import Any

from penstock.common.errors import UserError
from penstock.store.corpus import Corpus
from penstock.store.dataset import Dataset
from penstock.store.heads import Head, chain, newest_head
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
    dataset: Dataset,
    corpus: Corpus,
    evaluation: dict[str, Any],
    evaluate_seconds: float,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the metric history of a run.

    `loss`, `l0` and `dead_features` of an SAE are those of its last training window, the same that
    /metrics shows; `explained_variance` and `ce_recovered` are on held-out text.
    """
    head = last_head(runs, config)
    heads = chain(runs, config.run_id, head)
    history = load_history(runs, config.run_id, head)
    chunks = _production(dataset)
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
            "name": dataset.manifest.source.name,
            "weights_sha256": dataset.manifest.source.weights_sha256,
        },
        "dataset": {
            "url": dataset.url,
            "rows": dataset.manifest.total_rows,
            "chunks": dataset.n_chunks,
            "bytes": dataset.n_chunks * dataset.manifest.chunk_bytes(),
            "hooks": {hook.name: hook.d_in for hook in dataset.manifest.hooks},
            "context": dataset.manifest.context,
            "corpus": corpus.manifest.description,
            "digest": dataset.manifest.digest,
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
            _harvest_stage(dataset, chunks),
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
    figures, held_out = head.metrics[name], dict(evaluation["saes"][name])
    entry = {
        "name": name,
        "hook_name": settings.hook_name,
        "architecture": settings.architecture,
        "d_in": config.dataset.widths[settings.hook_name],
        "d_sae": settings.d_sae,
        "rows": head.rows,
        "steps": head.step,
        "loss": figures["loss"],
        "l0": figures["l0"],
        "dead_features": int(figures["dead_features"]),
        "explained_variance": held_out["explained_variance"],
        "ce_recovered": held_out["ce_recovered"],
        "density": held_out.pop("density"),
        "held_out": held_out,
        "weights_sha256": head.checkpoint[f"sae/{name}"].sha256,
    }
    for key in ("k", "l1_coefficient"):
        if hasattr(settings, key):
            entry[key] = getattr(settings, key)
    return entry


def _production(dataset: Dataset) -> list[tuple[float, int]]:
    """(time, rows committed so far) of each commit, from provenance records, oldest first."""
    times: dict[int, float] = {}
    for key, _ in dataset.store.list("provenance/"):
        if key.endswith(".json"):
            record = dataset.store.get_record(key)
            index, when = record["index"], record["time"]
            times[index] = min(when, times.get(index, when))
    total, points = 0, []
    for index, when in sorted(times.items(), key=lambda item: item[1]):
        total += dataset.manifest.rows[index]
        points.append((when, total))
    return points


def _harvest_stage(dataset: Dataset, chunks: list[tuple[float, int]]) -> dict[str, Any]:
    seconds = chunks[-1][0] - chunks[0][0] if len(chunks) > 1 else 0.0
    # the first commit's own duration is not recorded, so its rows are left out of the rate
    rows = chunks[-1][1] - chunks[0][1] if chunks else 0
    return {
        "name": "harvest",
        "seconds": seconds,
        "rows_per_second": rows / seconds if seconds else None,
    }
