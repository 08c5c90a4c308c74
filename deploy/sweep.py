"""`penstock sweep`: run a config, then compare every dictionary of its finished runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penstock.common.errors import UserError
from penstock.deploy.config import Config
from penstock.store.objects import ObjectStore, open_store

SUMMARY_FIELDS = (
    *(
        "name",
        "run",
        "hook_name",
        "architecture",
        "l1_coefficient",
        "alpha",
        "k",
        "d_sae",
        "size_ratio",
        "seed",
    ),
    *("mmcs", "matched_cosine", "duplicates", "dead_features", "dead_minibatches", "loss"),
    *("reconstruction_loss", "l1", "l0", "explained_variance", "held_out_loss", "mmcs_with_larger"),
    *("found_by_larger", "seed_agreement", "convergence", "ssll", "steps", "batch_rows"),
)
"""What the JSON summary of a sweep tells of each dictionary."""


def sweep(config: Config, progress: Callable[[str], None]) -> tuple[int, list[dict[str, Any]]]:
    """Run everything that the config describes, or what is left of it, and report on all its runs.

    Returns:
        The exit code of the run, and the summary's records (none if it was stopped).
    """
    from penstock.deploy.state import read_state
    from penstock.deploy.supervisor import report_folder, run

    code = run(config)
    state = read_state(config)
    if code or not state.finished:
        return code, []
    folders = {run_id: report_folder(config, number, run_id) for number, run_id in enumerate(state.runs)}
    return 0, write_sweep(
        open_store(config.runs_url), folders, config.directory, config.directory.name, progress
    )


def write_sweep(
    store: ObjectStore,
    folders: dict[str, Path],
    out: Path,
    title: str,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Compare the SAEs of finished runs; write sweep.html, sweep/*.csv and the summary below `out`.

    The summary is toy-summary.json where the true features are known, else sweep-summary.json.

    Args:
        store: where the runs are.
        folders: run id -> where its summary.json lies.

    Raises:
        UserError: the runs did not read the same dataset, or one has no summary yet.
    """
    from penstock.common.memory import keep_freed_memory
    from penstock.store.truth import load_truth
    from penstock.trainer.config import load_run_config, open_pinned
    from penstock.trainer.summary import last_head
    from penstock.trainer.sweep.measure import Finished, measure
    from penstock.trainer.sweep.report import render_sweep

    keep_freed_memory()
    runs = []
    for run_id, folder in folders.items():
        run = load_run_config(store, run_id)
        runs.append(Finished(store, run, last_head(store, run), _summary(folder, run_id)))
    if len({tuple(pin.manifest_digest for pin in run.config.datasets) for run in runs}) != 1:
        raise UserError("runs: they read different datasets; a sweep compares dictionaries of the same rows")
    truth = load_truth(open_pinned(runs[0].config).parts[0])
    records = measure(runs, truth, progress)
    densities = {
        f"{run.config.run_id}/{sae['name']}": sae["density"]
        for run in runs
        for sae in run.summary["saes"]
        if sae.get("density")
    }
    about = {
        "title": title,
        "runs": list(folders),
        "rows": runs[0].head.rows,
        "steps": runs[0].head.step,
        "batch_rows": runs[0].config.settings.batch_rows,
        "dataset": runs[0].summary["dataset"]["corpus"],
        "true_features": None if truth is None else len(truth.features),
    }
    made = render_sweep(records, densities, about)
    (out / "sweep").mkdir(parents=True, exist_ok=True)
    for name, text in made.files.items():
        (out / "sweep" / name).write_text(text, encoding="utf-8")
    (out / "sweep.html").write_text(made.html, encoding="utf-8")
    told = [{field: record.get(field) for field in SUMMARY_FIELDS} for record in records]
    name = "sweep-summary.json" if truth is None else "toy-summary.json"
    (out / name).write_text(json.dumps(told, indent=1) + "\n")
    return told


def best_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """What a sweep came to, in a few lines."""
    largest = max((record["d_sae"] for record in records), default=0)
    lines = [f"{len(records)} dictionaries; largest dictionary tested: {largest} features"]
    for field, what in (
        ("mmcs", "MMCS with the true features"),
        ("mmcs_with_larger", "MMCS with larger ones"),
    ):
        known = [record for record in records if record[field] is not None]
        if known:
            best = max(known, key=lambda record: record[field])
            lines.append(f"best {what}: {best[field]:.3f}, {best['name']}")
    return lines


def _summary(folder: Path, run_id: str) -> dict[str, Any]:
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder}/summary.json: not there; `penstock report` writes it") from error
    if summary.get("run") != run_id:
        raise UserError(
            f"{folder}/summary.json is of run {summary.get('run')}, not of {run_id}; report again"
        )
    return dict(summary)
