"""`penstock evaluate`: a run's dictionaries judged inside the language model.

<out>/evaluation.json     settings, what was judged, warnings, and every experiment's record
<out>/evaluation.html     the page
<out>/<figure>.csv        the data of each figure and table
<out>/parts/              records of finished parts: what a later call does not measure again
<out>/corpus-…/           held-out text packed at another context than the dictionaries' own
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from penstock.common.errors import ConfigError, UserError, nearest
from penstock.common.logs import LOGGER
from penstock.deploy.config import Config, EvaluationSettings
from penstock.deploy.counting import Counting
from penstock.deploy.evaluation import check_weights
from penstock.deploy.judged_text import check_context, departures, judged_text
from penstock.store.objects import ObjectStore, open_store

if TYPE_CHECKING:
    from penstock.store.joined import JoinedDataset
    from penstock.trainer.config import RunConfig
    from penstock.trainer.judging.experiments import Case, Experiment, Measurement

FORMAT = 1


@dataclass(frozen=True)
class Judged:
    """An evaluation, and where it lies."""

    evaluation: dict[str, Any]
    out: str

    def lines(self) -> list[str]:
        """What it came to, in a few lines."""
        overview = self.evaluation["experiments"].get("overview", {}).get("dictionaries", {})
        told = {"ce_recovered": "CE recovered", "delta_ce": "ΔCE", "kl": "KL"}
        lines = [
            f"{name}: L0 {one['l0']:.1f}, "
            + ", ".join(f"{label} {one[key]:.4f}" for key, label in told.items() if one[key] is not None)
            for name, one in overview.items()
        ]
        return [*lines, f"{self.out}/evaluation.html"]


def judge(
    config: Config,
    run_url: str,
    out: str | None,
    only: Sequence[str],
    changes: dict[str, Any],
    counting: Counting,
) -> Judged:
    """Measure what was asked for, or what is left of it, and write everything below `out`.

    Args:
        out: a directory or URL; None means evaluation/<run id> below the workdir.
        only: names of experiments; all of them if empty.
        changes: evaluation settings that override the config's.

    Raises:
        UserError: no such experiment, the run has no language model or no checkpoint, nothing is held out.
        ModelError: the config's model is not the one that the run was trained on.
        ConfigError: a setting does not fit the run or the model.
        DataError: stored objects are missing or damaged.
    """
    from penstock.common.memory import keep_freed_memory
    from penstock.common.model.files import find_model, load_tokenizer
    from penstock.common.model.language_model import LanguageModel
    from penstock.trainer.config import load_run_config, open_pinned
    from penstock.trainer.judging.experiments import Case, chosen
    from penstock.trainer.judging.splicing.dictionaries import Dictionary
    from penstock.trainer.judging.splicing.subject import Subject
    from penstock.trainer.load import load_saes, split_run_url
    from penstock.trainer.summary import last_head

    keep_freed_memory()
    began = time.time()
    experiments = chosen(only)
    settings = config.evaluation.model_copy(update=changes)
    runs, run_id = split_run_url(run_url)
    run = load_run_config(runs, run_id)
    head = last_head(runs, run)
    data = open_pinned(run)
    _check_language_model(run, data)
    _check_names(settings, config, run)
    url = out or str(config.directory / "evaluation" / run_id)
    store = open_store(url)
    store.probe()
    files = find_model(config.model)
    check_weights(files, run)
    tokenizer = load_tokenizer(files)
    manifests = [part.manifest for part in data.parts]
    trained_context = max(manifest.context for manifest in manifests)
    counting.begin("loading the model")
    # nothing here needs to be bit-identical to what is stored: use the whole machine
    model = LanguageModel(files, config.model.model_copy(update={"threads": None}))
    check_context(settings.context or trained_context, model)
    counting.begin("packing the text")
    judged = judged_text(config, settings, trained_context, tokenizer, url)
    warnings = departures(manifests, judged, model, trained_context)
    for line in warnings:
        LOGGER.warning("%s", line)
    saes = load_saes(runs, run, head)
    subject = Subject(
        model,
        judged.text,
        [Dictionary.of_sae(name, sae, model.device) for name, sae in saes.items()],
        trained_context,
    )
    told = {
        "model": {
            "name": files.label,
            "weights_sha256": files.weights_sha256(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "text": judged.about(),
        "trained_context": trained_context,
        "head": head.n,
        "datasets": [manifest.digest for manifest in manifests],
        "dictionaries": {
            one.name: {
                "hook_name": one.hook_name,
                "hook_out": one.hook_out,
                "architecture": saes[one.name].architecture,
                "d_sae": one.module.d_sae,
                "weights_sha256": head.checkpoint[f"sae/{one.name}"].sha256,
            }
            for one in subject.dictionaries
        },
    }
    case = Case(subject, settings, tokenizer, data)
    for one in experiments:
        # what cannot be had is told before anything is measured, which may take hours
        one.measurement.reads(case)
    records = {
        one.name: one.answer(_measured(one.measurement, case, store, told, counting)) for one in experiments
    }
    evaluation = {
        "format": FORMAT,
        "run": run_id,
        "warnings": warnings,
        "settings": settings.model_dump(mode="json", exclude={"sequences"}),
        "subject": told,
        "environment": {
            "time": began,
            "seconds": time.time() - began,
            "penstock": version("penstock"),
            "torch": version("torch"),
            "python": platform.python_version(),
            "device": str(model.device),
        },
        "experiments": records,
    }
    _write(store, evaluation, experiments)
    return Judged(evaluation, url)


def _measured(
    measurement: "Measurement", case: "Case", store: ObjectStore, told: dict[str, Any], counting: Counting
) -> dict[str, Any]:
    """The record of a measurement: what is kept of it, and the rest measured now."""
    from dataclasses import replace

    from penstock.trainer.judging.parts import Parts

    fields = case.settings.model_dump(mode="json")
    inputs = {
        "penstock": version("penstock"),
        "device": case.subject.model.device.type,
        "measurement": measurement.name,
        "settings": {name: fields[name] for name in measurement.settings},
        "reads": measurement.reads(case),
        **{key: told[key] for key in ("model", "text", "trained_context")},
    }

    def part(name: str, some: "Case") -> dict[str, Any]:
        known = told["dictionaries"]
        judged = {one.name: known[one.name] for one in some.subject.dictionaries}

        def compute() -> dict[str, Any]:
            counting.begin(name)
            return measurement.measure(some, counting)

        return Parts(store, inputs | {"dictionaries": judged}).part(name, compute)

    if not measurement.apart:
        return part(measurement.name, case)
    record: dict[str, Any] = {}
    for one in case.subject.dictionaries:
        alone = replace(case, subject=replace(case.subject, dictionaries=[one]))
        record |= part(f"{measurement.name}/{one.name}", alone)
    return record


def _write(store: ObjectStore, evaluation: dict[str, Any], experiments: "Sequence[Experiment]") -> None:
    from penstock.trainer.judging.page import csv_files, render_evaluation, shown_by

    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    sections = shown_by(experiments, evaluation["experiments"])
    for name, data in csv_files(sections).items():
        store.put(name, data.encode())
    store.put("evaluation.html", render_evaluation(evaluation, sections).encode())
    store.put("evaluation.json", text.encode())


def _check_language_model(run: "RunConfig", data: "JoinedDataset") -> None:
    if not all(part.manifest.of_text for part in data.parts):
        raise UserError(
            f"run {run.run_id}: its rows are not a language model's, so there is nothing to put dictionaries "
            "into; `penstock report` measures them on held-out rows"
        )


def _check_names(settings: EvaluationSettings, config: Config, run: "RunConfig") -> None:
    """Features are asked for of SAEs that there are: in this run, or in another one of the config."""
    known = dict.fromkeys(sae.name for one in (run.settings, *config.runs) for sae in one.saes)
    for name in settings.contexts.features:
        if name not in known:
            raise ConfigError(
                f"evaluation.contexts.features: there is no SAE {name!r}.{nearest(name, known)}"
            )
