"""The command line. Commands import what they need when they run, so that help is instant."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from penstock.common.errors import DataError, PenstockError
from penstock.common.logs import LEVELS, LOGGER, log_what_is_not_caught, logs_json, set_up_logging, tell_about
from penstock.common.process import SUPERVISED_VARIABLE, follow_supervisor
from penstock.common.redact import hide_in_url, redact

WORKDIR = click.option("--workdir", help="Directory for everything; overrides the config's.")
CONFIG = click.argument("config")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="penstock")
@click.option("--metrics-port", type=int, help="Port for /metrics; overrides the config's.")
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    envvar="PENSTOCK_LOG_FORMAT",
    help="Text, or one JSON object per line; overrides the config's json_logs.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    envvar="PENSTOCK_LOG_LEVEL",
    help="The least that is logged; overrides the config's log_level.",
)
@click.pass_context
def cli(
    context: click.Context, metrics_port: int | None, log_format: str | None, log_level: str | None
) -> None:
    """Language-model activations into sparse autoencoders.

    Most commands take CONFIG, a YAML file; `penstock config --schema` lists every setting.
    """
    # before a config is read: it may be what is wrong
    set_up_logging(log_format == "json", logging.getLevelNamesMapping()[(log_level or "info").upper()])


def _load(path: str, workdir: str | None = None) -> Any:
    from penstock.deploy.config import load_config

    config = load_config(path, workdir)
    given, changes = click.get_current_context().find_root().params, dict[str, Any]()
    if given.get("metrics_port") is not None:
        changes["metrics"] = config.metrics.model_copy(update={"port": given["metrics_port"]})
    if given.get("log_format") is not None:
        changes["json_logs"] = given["log_format"] == "json"
    if given.get("log_level") is not None:
        changes["log_level"] = given["log_level"]
    config = config.model_copy(update=changes)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    set_up_logging(config.json_logs, level, config.library_logs)
    tell_about(role=click.get_current_context().info_name)
    hide_in_url(config.redis.url)
    return config


def _tell(text: str) -> None:
    """Say how far it is; the last such line is what the supervisor shows."""
    if logs_json():
        LOGGER.info("%s", text)
    else:
        click.echo(redact(text), err=True)


def _result(text: str) -> None:
    """Results go to standard output; under a supervisor that is a log, too."""
    if logs_json() and SUPERVISED_VARIABLE in os.environ:
        LOGGER.info("%s", text)
    else:
        click.echo(text)


@cli.command()
@CONFIG
@WORKDIR
def run(config: str, workdir: str | None) -> None:
    """Everything on one machine: corpus, producers, trainers, report."""
    from penstock.deploy.supervisor import run as supervise

    sys.exit(supervise(_load(config, workdir)))


@cli.command()
@CONFIG
@WORKDIR
@click.option("--gb-month", type=click.FloatRange(0), help="Price of storing 10⁹ bytes for a month.")
@click.option("--gpu-hour", type=click.FloatRange(0), help="Price of a producer's GPU or machine per hour.")
@click.option("--months", type=click.FloatRange(0), default=1.0, show_default=True, help="To be stored.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-probe", is_flag=True, help="Measure nothing: no times.")
@click.option(
    "--probe-store", is_flag=True, help="Measure storing at the dataset's URL; leaves nothing there."
)
def plan(
    config: str,
    workdir: str | None,
    gb_month: float | None,
    gpu_hour: float | None,
    months: float,
    as_json: bool,
    no_probe: bool,
    probe_store: bool,
) -> None:
    """What a config will take: rows, bytes, time, memory, cost. Refuses what cannot fit; writes nothing."""
    from penstock.deploy.plan.make import make_plan
    from penstock.deploy.plan.record import Prices
    from penstock.deploy.plan.text import plan_lines

    if no_probe and probe_store:
        raise click.UsageError("--probe-store and --no-probe exclude each other")
    made = make_plan(
        _load(config, workdir),
        Prices(gb_month, gpu_hour, months),
        not no_probe,
        probe_store,
        lambda text: click.echo(text, err=True),
    )
    if as_json:
        import json

        click.echo(json.dumps(made.record(), indent=1))
        return
    for line in plan_lines(made):
        click.echo(line)


@cli.command()
@CONFIG
@WORKDIR
def corpus(config: str, workdir: str | None) -> None:
    """Tokenise and pack the text."""
    from penstock.deploy.processes import build_corpus

    shown = -1

    def progress(done: int, wanted: int | None) -> None:
        nonlocal shown
        if done // 1_000_000 > shown:
            shown = done // 1_000_000
            _tell(f"{done:,} tokens" + (f" of {wanted:,}" if wanted else ""))

    manifest = build_corpus(_load(config, workdir), progress).manifest
    _result(
        f"{manifest.n_sequences} sequences of {manifest.context} tokens, {manifest.n_held_out} held out, "
        f"from {manifest.n_documents} documents; digest {manifest.digest[:12]}"
    )


@cli.command()
@CONFIG
@WORKDIR
def produce(config: str, workdir: str | None) -> None:
    """One producer process, until the dataset is complete."""
    from penstock.deploy.processes import produce as run_producer

    run_producer(_load(config, workdir))


@cli.command()
@CONFIG
@WORKDIR
def submit(config: str, workdir: str | None) -> None:
    """Submit the config's runs to whichever trainers there are."""
    from penstock.deploy.processes import submit as submit_runs

    for run_id, new in submit_runs(_load(config, workdir)):
        click.echo(f"{run_id} {'submitted' if new else 'was submitted before'}")


@cli.command()
@CONFIG
@WORKDIR
@click.option("--drain", is_flag=True, help="Exit once every submitted run has ended.")
@click.option(
    "--evaluate-every",
    type=click.IntRange(0),
    metavar="ROWS",
    help="Evaluate SAEs inside the model each time so many rows were trained on; overrides the config's.",
)
def train(config: str, workdir: str | None, drain: bool, evaluate_every: int | None) -> None:
    """One trainer process: carries submitted runs on."""
    from penstock.deploy.processes import train as run_trainer

    loaded = _load(config, workdir)
    if evaluate_every is not None:
        changed = loaded.trainer.model_copy(update={"evaluate_every": evaluate_every})
        loaded = loaded.model_copy(update={"trainer": changed})
    run_trainer(loaded, drain)


@cli.command()
@CONFIG
@click.argument("run_url")
@WORKDIR
@click.option("--out", default=".", help="Directory for report.html and summary.json.")
def report(config: str, run_url: str, workdir: str | None, out: str) -> None:
    """Evaluate a run on what is held out and write its report."""
    from penstock.deploy.processes import report as make_report

    def progress(done: int, total: int) -> None:
        _tell(f"evaluated: {done} of {total} passes over held-out sequences")

    summary = make_report(_load(config, workdir), run_url, Path(out), progress)
    for sae in summary["saes"]:
        told = {"explained variance": "explained_variance", "cross-entropy recovered": "ce_recovered"}
        known = [f"{label} {sae[key]:.3f}" for label, key in told.items() if sae[key] is not None]
        known += [f"L0 {sae['l0']:.1f}", f"{sae['dead_features']} dead"]
        _result(f"{sae['name']}: {', '.join(known)}")


@cli.command()
@click.argument("evaluations", nargs=-1, required=True, metavar="[LABEL=]PATH...")
@click.option("--out", default="compare.html", show_default=True, help="The page; CSV files go beside it.")
def compare(evaluations: tuple[str, ...], out: str) -> None:
    """Evaluations side by side: summary.json files, or directories of `run` that hold one."""
    from penstock.deploy.compare import compare as compare_evaluations

    for line in compare_evaluations(evaluations, Path(out)):
        click.echo(line)


@cli.command()
@CONFIG
@click.argument("run_url")
@WORKDIR
@click.option("--out", help="Directory for the results; by default evaluation/RUN_ID below the workdir.")
@click.option(
    "--only", multiple=True, metavar="NAME", help="One experiment; may be repeated. All by default."
)
@click.option("--sequences", type=click.IntRange(1), help="Overrides evaluation.judged_sequences.")
@click.option("--context", type=click.IntRange(2), help="Overrides evaluation.context.")
def evaluate(
    config: str,
    run_url: str,
    workdir: str | None,
    out: str | None,
    only: tuple[str, ...],
    sequences: int | None,
    context: int | None,
) -> None:
    """Judge a run's dictionaries inside the language model: evaluation.html, JSON and CSV. Again: resume."""
    from penstock.deploy.counting import Counting
    from penstock.deploy.judge import judge

    given = {"judged_sequences": sequences, "context": context}
    changes = {name: value for name, value in given.items() if value is not None}
    with Counting(_tell) as counting:
        done = judge(_load(config, workdir), run_url, out, list(only), changes, counting)
    for line in done.lines():
        _result(line)


@cli.command()
@CONFIG
@WORKDIR
def sweep(config: str, workdir: str | None) -> None:
    """Run a config, as `run` does, and compare all its dictionaries: sweep.html, CSV files, a summary."""
    from penstock.deploy.sweep import best_lines
    from penstock.deploy.sweep import sweep as run_sweep

    code, records = run_sweep(_load(config, workdir), lambda what: click.echo(what, err=True))
    for line in best_lines(records) if records else ():
        click.echo(line)
    sys.exit(code)


@cli.command()
@click.argument("run_url")
@click.option(
    "--format",
    "format_",
    required=True,
    type=click.Choice(["saelens", "dictionary-learning", "sparsify"]),
    help="The library that is to read it.",
)
@click.option("--sae", "names", multiple=True, help="Name of an SAE; may be repeated. All by default.")
@click.option("--out", default=".", help="Directory to hold one directory per SAE.")
def export(run_url: str, format_: str, names: tuple[str, ...], out: str) -> None:
    """Write trained SAEs in another library's files. Overwrites nothing."""
    from penstock.trainer.exchange.write import export_run

    for directory in export_run(run_url, format_, Path(out), list(names) or None):
        click.echo(str(directory))


@cli.command()
@CONFIG
@WORKDIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", "live", is_flag=True, help="Go on looking until stopped.")
def status(config: str, workdir: str | None, as_json: bool, live: bool) -> None:
    """Datasets, runs and workers: how far, how fast, who holds what, what waits for what."""
    from penstock.deploy.status import print_status, watch

    (watch if live else print_status)(_load(config, workdir), as_json, click.echo)


@cli.command()
@CONFIG
@WORKDIR
@click.option(
    "--every", type=click.FloatRange(0.1, 120), default=10.0, show_default=True, help="Seconds between looks."
)
def exporter(config: str, workdir: str | None, every: float) -> None:
    """Publish what the store and Redis hold, as metrics, until stopped."""
    from penstock.deploy.exporter import export

    export(_load(config, workdir), every)


@cli.command()
@click.argument("url", required=False)
@click.option("--model", help="List a model's hook points instead.")
@click.option("--mixing", is_flag=True, help="Measure how well a dataset's rows are mixed in batches.")
@click.option(
    "--window-chunks", type=click.IntRange(1), help="With --mixing: as in a run; so is its default."
)
@click.option("--batch-rows", type=click.IntRange(2), help="With --mixing: as in a run; so is its default.")
@click.option("--seed", type=int, help="With --mixing: as in a run; so is its default.")
@click.option("--hook", "hooks", multiple=True, help="With --mixing: only this hook point; repeatable.")
def inspect(url: str | None, model: str | None, mixing: bool, **measured: Any) -> None:
    """Describe a dataset, corpus or run at URL. --mixing exits with code 1 if rows are not shuffled."""
    from penstock.deploy.look import describe, hook_points

    if model is None and url is None:
        raise click.UsageError("give a URL or --model NAME")
    if mixing:
        from penstock.deploy.mixing import mixing_report

        if url is None:
            raise click.UsageError("--mixing needs a dataset's URL")
        lines, shuffled = mixing_report(url, **measured)
        click.echo("\n".join(lines))
        sys.exit(0 if shuffled else 1)
    if any(value not in (None, ()) for value in measured.values()):
        raise click.UsageError("--window-chunks, --batch-rows, --seed and --hook go with --mixing")
    for line in hook_points(model) if model is not None else describe(url or ""):
        click.echo(line)


@cli.command()
@click.argument("url")
@click.option("--out", default="README.md", show_default=True, help="The card; plots go beside it.")
@click.option("--licence", "--license", "dataset", help="Licence of the dataset, e.g. cc-by-4.0.")
@click.option("--model-licence", "--model-license", "model", help="Licence of the language model.")
@click.option("--text-licence", "--text-license", "text", help="Licence of the text.")
def card(url: str, out: str, **licences: str | None) -> None:
    """Write a dataset card in Markdown: what the dataset at URL is made of, and how to open it."""
    from penstock.deploy.card import Licences, write_card

    for path in write_card(url, Path(out), Licences(**licences)):
        click.echo(path)


@cli.command()
@click.argument("url")
def verify(url: str) -> None:
    """Check a dataset, corpus or run; says what `repair` would do. Exit code 1 if anything is wrong."""
    from penstock.deploy.heal import faults

    checked = 0

    def count() -> None:
        nonlocal checked
        checked += 1
        if checked % 1000 == 0:
            click.echo(f"{checked} checked", err=True)

    what, found = faults(url, count)
    wrong = 0
    for fault in found:
        wrong += 1
        click.echo(str(fault))
    click.echo(f"{what}: {wrong} faults" if wrong else f"{what}: no faults")
    sys.exit(1 if wrong else 0)


@cli.command()
@CONFIG
@WORKDIR
def repair(config: str, workdir: str | None) -> None:
    """Put right what is damaged in the config's corpus, dataset and runs."""
    from penstock.deploy.heal import Repair

    healer = Repair(_load(config, workdir), click.echo)
    healer.everything()
    click.echo(f"{healer.left} faults are left" if healer.left else "everything is whole")
    sys.exit(1 if healer.left else 0)


@cli.command()
@click.argument("run_url")
def cancel(run_url: str) -> None:
    """End a run; its last head stays."""
    from penstock.deploy.manage import cancel as cancel_run

    click.echo(cancel_run(run_url))


@cli.command()
@click.argument("run_url")
def detach(run_url: str) -> None:
    """Let a dataset with retention: window delete what a run has not read; the run then fails."""
    from penstock.deploy.manage import detach as detach_run

    click.echo(detach_run(run_url))


@cli.command()
@click.argument("url")
def bucket(url: str) -> None:
    """Create the bucket of an S3 URL, unless it is there."""
    from penstock.deploy.bucket import make_bucket

    made, new = make_bucket(url)
    click.echo(f"{made} {'created' if new else 'was there before'}")


@cli.command()
@click.argument("url")
@click.option("--yes", is_flag=True, help="Delete; without it only what would be deleted is shown.")
def rm(url: str, yes: bool) -> None:
    """Remove a dataset, corpus or run. Refuses what a live run needs."""
    from penstock.deploy.manage import remove

    for line in remove(url, yes):
        click.echo(line)


@cli.command()
@click.argument("path", required=False)
@click.option(
    "--schema",
    is_flag=True,
    help="Print every setting: type, default, unit, meaning (JSON schema).",
)
def config(path: str | None, schema: bool) -> None:
    """Check a config file, or print the schema of all settings."""
    from penstock.deploy.config import Config, load_config

    if schema:
        import json

        click.echo(json.dumps(Config.model_json_schema(), indent=1))
    elif path is not None:
        load_config(path)
        click.echo(f"{path}: fine")
    else:
        raise click.UsageError("give a config file or --schema")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one line per error, exit code 2 for what the user can change."""
    follow_supervisor()
    if arguments is None:
        log_what_is_not_caught()
    try:
        cli.main(args=arguments, prog_name="penstock", standalone_mode=False)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(redact(said.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except PenstockError as error:
        hint = "; `penstock repair CONFIG` may put it right" if isinstance(error, DataError) else ""
        if logs_json():
            LOGGER.error("%s%s", error, hint)
        else:
            click.echo(redact(f"error: {error}{hint}"), err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
