"""`penstock plan`: what a config will take, before anything is made of it. Nothing of the user's is written.

Rows, bytes and objects follow from the manifest, which is resolved as a producer would. Where there is no
corpus yet, the text is tokenised into a temporary directory; of long texts the beginning, and the rest is
estimated. Times come from a short probe (`probe.py`) and from how processes share this machine
(`time.py`): as if all producers and trainers ran here, and nothing else.

    whole = start + corpus + loading the model + producing and training side by side + reports
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.common.errors import ObjectMissing
from penstock.deploy.config import Config
from penstock.deploy.plan.cost import price
from penstock.deploy.plan.record import Plan, Prices
from penstock.deploy.plan.rows import Say, extrapolated, is_sample, planning_corpus
from penstock.store.objects import open_store

if TYPE_CHECKING:
    from penstock.store.manifest import Manifest
    from penstock.trainer.config import RunConfig


def make_plan(
    config: Config,
    prices: Prices,
    probing: bool = True,
    probe_store: bool = False,
    say: Say = lambda text: None,
) -> Plan:
    """Work everything out.

    Args:
        probing: measure; else nothing is said about time, and memory is a lower bound.
        probe_store: measure storing below the dataset's own URL, and remove what was stored.
        say: called with what is going on.

    Raises:
        UserError: something given is wrong, or does not fit; as a producer or trainer would say, or sooner.
    """
    began = time.process_time()
    import penstock.trainer.worker  # noqa: F401  (what a trainer loads)
    from penstock.common.memory import held_bytes, keep_freed_memory

    keep_freed_memory()
    base_bytes, base_seconds = held_bytes(), time.process_time() - began
    loaded = Loaded(base_bytes, base_seconds, time.process_time() - began)
    plan = _plan_toy if config.toy is not None else _plan_text
    made, hours = plan(config, loaded, probing, probe_store, say)
    price(made, prices, hours, sum(run.epochs for run in config.runs))
    return made


@dataclass(frozen=True)
class Loaded:
    """A process that has loaded what a trainer needs: bytes and seconds; seconds since it was asked."""

    bytes: int
    seconds: float
    took: float


def _plan_toy(
    config: Config, process: Loaded, probing: bool, probe_store: bool, say: Say
) -> tuple[Plan, float | None]:
    """Toy data have neither a model nor a corpus to be loaded or measured."""
    from penstock.deploy.plan.fit import fit
    from penstock.deploy.plan.resolved import Resolved
    from penstock.deploy.plan.sizes import count
    from penstock.producer.memory import store_threads
    from penstock.producer.toy import Toy
    from penstock.producer.toy_source import plan_toy

    assert config.toy is not None
    manifest, plan = plan_toy(config.dataset, Toy(config.toy)), Plan(config.dataset.url, estimated=False)
    what = Resolved(
        config=config,
        manifest=manifest,
        language_model=None,
        tokens=None,
        runs=_resolve(config, manifest, plan),
        threads=store_threads(
            manifest.chunk_bytes(), manifest.largest_object_bytes(), config.dataset.memory_bytes
        ),
        base_bytes=process.bytes,
        base_seconds=process.seconds,
        loading_seconds=0.0,
        corpus_seconds=0.0,
    )
    count(what, plan, None)
    fit(what, plan, None)
    if probing:
        plan.notes.append("times are not measured for toy data")
    return plan, None


def _plan_text(
    config: Config, process: Loaded, probing: bool, probe_store: bool, say: Say
) -> tuple[Plan, float | None]:
    began = time.process_time()
    from penstock.common.model.files import find_model
    from penstock.common.model.language_model import LanguageModel
    from penstock.deploy.plan.fit import fit
    from penstock.deploy.plan.resolved import Resolved
    from penstock.deploy.plan.sizes import count
    from penstock.producer.memory import store_threads
    from penstock.producer.plan import plan_dataset
    from penstock.store.arrays import PLAIN

    say("loading the model")
    model = LanguageModel(find_model(config.model), config.model)
    loaded = time.process_time()
    with planning_corpus(config, say) as (corpus, corpus_seconds):
        tokenised = time.process_time()
        sampled = is_sample(config, corpus)
        settings = config.dataset.model_copy(update={"max_rows": None}) if sampled else config.dataset
        manifest = plan_dataset(settings, corpus, model)
        share = 1.0
        if sampled:
            manifest = extrapolated(config, manifest)
            share = manifest.corpus.n_sequences / corpus.manifest.n_sequences
        planned = time.process_time()
        plan = Plan(config.dataset.url, estimated=sampled)
        runs = _resolve(config, manifest, plan)
        what = Resolved(
            config=config,
            manifest=manifest,
            language_model=model,
            tokens=corpus,
            runs=runs,
            threads=store_threads(
                manifest.chunk_bytes(), manifest.largest_object_bytes(), settings.memory_bytes
            ),
            base_bytes=process.bytes,
            base_seconds=process.seconds,
            loading_seconds=process.took + loaded - began + planned - tokenised,
            corpus_seconds=corpus_seconds,
        )
        found, hours = None, None
        # what cannot fit is refused before anything is measured
        count(what, plan, None)
        fit(what, plan, None)
        if probing:
            from penstock.deploy.plan.course import course, measure

            found = measure(what, probe_store, say)
            plan.seconds, plan.rates, hours = course(what, found, plan.committed, share)
            if found.store is None:
                plan.notes.append(
                    f"storing at {config.dataset.url} was not measured; --probe-store does that, and removes "
                    "what it stored"
                )
            count(what, plan, found)
            fit(what, plan, found)
        elif manifest.codec != PLAIN:
            plan.notes.append("compression was not measured: bytes are the most that there can be")
        return plan, hours


def _resolve(config: Config, manifest: "Manifest", plan: Plan) -> "dict[str, RunConfig]":
    """The runs, by name; raises what producers and `submit` would, and counts what is there already."""
    from penstock.store.commits import committed_indices
    from penstock.store.dataset import Dataset, open_dataset
    from penstock.store.joined import JoinedDataset
    from penstock.store.manifest import check_same_plan, load_manifest
    from penstock.store.retention import budget_chunks, check_quota
    from penstock.trainer.config import check_budget, resolve_run

    settings, store = config.dataset, open_store(config.dataset.url)
    check_quota(manifest, settings.quota_bytes, settings.budget_bytes)
    budget = budget_chunks(manifest, settings.budget_bytes)
    runs = {}
    for run in config.runs:
        urls = run.datasets or [settings.url]
        parts = [Dataset(store, manifest) if url == settings.url else open_dataset(url) for url in urls]
        runs[run.name] = resolve_run(run, JoinedDataset(parts))
        check_budget(runs[run.name], budget if settings.url in urls else None)
    try:
        there = load_manifest(store)
    except ObjectMissing:
        return runs
    if not plan.estimated:
        check_same_plan(store.url, there, manifest)
    plan.committed = len(committed_indices(store, there.n_chunks))
    return runs
