"""What cloze scores show (`cloze_score.py`)."""

import math
from statistics import median
from typing import Any

from markupsafe import Markup

from penstock.trainer.figures import MUTED, tone
from penstock.trainer.judging.shown import Shown, Table, keyed, with_l0
from penstock.trainer.judging.tasks import task_figures
from penstock.trainer.judging.tasks.cloze_score import CLASSES, QUANTITIES

Record = dict[str, Any]

CLASS_COLORS = dict(zip(CLASSES, (tone(0), tone(6), tone(2), MUTED), strict=True))
CLASS_KEY = tuple(
    (name.replace("_", " → "), variable, "")
    for name, variable in zip(CLASSES, ("--s0", "--s6", "--s2", "--muted"), strict=True)
)
_MEANING = {"mse": "Σ(x − x̂)²", "l0": "L0", "norm": "‖x‖"}


def show(record: Record) -> list[Shown]:
    """Figures and tables of a record."""
    if not record["dictionaries"]:
        return []
    return [
        _accuracy(record),
        _by_task(record),
        _classes(record),
        _strip(record),
        _parallel(record),
        *(_against(record, quantity) for quantity in QUANTITIES),
        _spearman(record),
    ]


def _names(record: Record) -> list[str]:
    return [one["name"] for one in record["dictionaries"]]


def _named(record: Record) -> list[str]:
    return [with_l0(one["name"], one["l0"]) for one in record["dictionaries"]]


def _beyond(record: Record) -> str:
    beyond = record["beyond_trained_context"]
    if not beyond:
        return ""
    return (
        f" {beyond:,} of the prompts are longer than the {record['trained_context']} tokens that the "
        "dictionaries were trained on."
    )


def _left_out(record: Record) -> str:
    found = [f"{n:,} of {task}" for task, n in record["left_out"].items() if n]
    return f" Left out, as the answer has no token of its own: {', '.join(found)}." if found else ""


def _accuracy(record: Record) -> Shown:
    clean, n = record["clean"]["accuracy"], record["prompts"]
    shares = [one["accuracy"] for one in record["dictionaries"]]
    spread = [math.sqrt(share * (1 - share) / n) for share in shares]
    svg = task_figures.levels(
        "cloze-accuracy",
        "Cloze accuracy of each dictionary beside the clean model's",
        _names(record),
        shares,
        clean,
        "clean",
        spread,
    )
    rows: list[list[object]] = [["clean", None, None, clean, record["clean"]["mean_ln_p"]]]
    rows += [
        [one["name"], one["hook_out"], one["l0"], one["accuracy"], one["mean_ln_p"]]
        for one in record["dictionaries"]
    ]
    note = (
        f"Share of {n:,} prompts whose answer is the likeliest token, ± its standard error; dashed: with "
        "nothing replaced."
    )
    return Shown(
        "cloze_accuracy",
        "Cloze accuracy",
        note + _beyond(record) + _left_out(record),
        ["dictionary", "hook point", "L0", "accuracy", "mean ln p"],
        rows,
        Markup(svg),
    )


def _by_task(record: Record) -> Shown:
    rows: list[list[object]] = []
    for task in record["tasks"]:
        clean = record["clean"]["by_task"][task]
        rows.append([task, "clean", None, clean["prompts"], clean["accuracy"], clean["mean_ln_p"], None])
        for one in record["dictionaries"]:
            ours = one["by_task"][task]
            figures = [ours[name] for name in ("prompts", "accuracy", "mean_ln_p", "mean_delta_ln_p")]
            rows.append([task, one["name"], one["l0"], *figures])
    shares = {(row[0], row[1]): row[4] for row in rows}
    levels = {one["name"]: one["l0"] for one in record["dictionaries"]}
    lines: list[list[object]] = [
        [name, levels.get(name), *(shares[task, name] for task in record["tasks"])]
        for name in ("clean", *levels)
    ]
    return Shown(
        "cloze_by_task",
        "Cloze accuracy by task",
        "Share of each task's prompts that are answered rightly with each dictionary in place, beside the "
        "clean model's.",
        ["task", "dictionary", "L0", "prompts", "accuracy", "mean ln p", "mean Δln p"],
        rows,
        table=Table(["dictionary", "L0", *record["tasks"]], lines),
    )


def _classes(record: Record) -> Shown:
    groups = [
        (
            name.replace("_", " → "),
            CLASS_COLORS[name],
            [one["classes"][name] for one in record["dictionaries"]],
        )
        for name in CLASSES
    ]
    rows: list[list[object]] = [
        [one["name"], one["l0"], *(one["classes"][name] for name in CLASSES), record["prompts"]]
        for one in record["dictionaries"]
    ]
    return Shown(
        "cloze_classes",
        "What becomes of right and wrong answers",
        "Prompts by the clean model's outcome and the one with the dictionary in place: right → wrong is "
        "what it breaks, wrong → right what it mends.",
        ["dictionary", "L0", *(name.replace("_", " → ") for name in CLASSES), "prompts"],
        rows,
        Markup(task_figures.stacks("cloze-classes", "Outcome classes", _names(record), groups)),
        legend=CLASS_KEY,
    )


def _class_of(clean: bool, spliced: bool) -> str:
    return f"{'right' if clean else 'wrong'}_{'right' if spliced else 'wrong'}"


def _strip(record: Record) -> Shown:
    clean = record["clean"]["right"]
    rows: list[list[object]] = []
    columns: dict[str, list[list[float | None]]] = {name: [] for name in CLASSES}
    for one in record["dictionaries"]:
        found: dict[str, list[float | None]] = {name: [] for name in CLASSES}
        for i, delta in enumerate(one["delta_ln_p"]):
            name = _class_of(clean[i], one["right"][i])
            found[name].append(delta)
            rows.append([one["name"], one["l0"], i, record["items"][i]["task"], name, delta])
        for name in CLASSES:
            columns[name].append(found[name])
    groups = [(name.replace("_", " → "), CLASS_COLORS[name], columns[name]) for name in CLASSES]
    svg = task_figures.strips("cloze-strip", "Δln p of each prompt by dictionary", _names(record), groups)
    return Shown(
        "cloze_delta",
        "Δln p of every prompt",
        "A dot per prompt: below 0 the dictionary makes its answer less likely, in nats; bars are medians of "
        f"all. At most {task_figures.MAX_DOTS} of an outcome are drawn.",
        ["dictionary", "L0", "prompt", "task", "class", "Δln p"],
        rows,
        Markup(svg),
        legend=CLASS_KEY,
    )


def _parallel(record: Record) -> Shown:
    names = ["clean", *_names(record)]
    columns = [record["clean"]["ln_p"], *(one["ln_p"] for one in record["dictionaries"])]
    lines = list(zip(*columns, strict=True))
    tasks = [item["task"] for item in record["items"]]
    groups = [
        (task, tone(i), [line for line, of in zip(lines, tasks, strict=True) if of == task])
        for i, task in enumerate(record["tasks"])
    ]
    svg = task_figures.parallel("cloze-parallel", "ln p of each prompt across dictionaries", names, groups)
    medians: list[list[object]] = [
        [task, *(float(median(column)) for column in zip(*of, strict=True))] for task, _, of in groups if of
    ]
    rows: list[list[object]] = [
        [i, item["task"], item["prompt"], item["answer"], item["tokens"], *line]
        for i, (item, line) in enumerate(zip(record["items"], lines, strict=True))
    ]
    return Shown(
        "cloze_ln_p",
        "ln p of the answers, side by side",
        "Each task's median, thick, and some of its prompts, thin: a line that falls is an answer that this "
        "dictionary makes less likely, in nats.",
        ["prompt", "task", "end of prompt", "answer", "tokens", *names],
        rows,
        Markup(svg),
        Table(["task", "clean", *_named(record)], medians),
        keyed(record["tasks"]),
    )


def _against(record: Record, quantity: str) -> Shown:
    groups, rows = [], list[list[object]]()
    for place, one in enumerate(record["dictionaries"]):
        last, mean = (one["values"][f"{quantity}_{where}"] for where in ("last", "mean"))
        delta = one["delta_ln_p"]
        points = [(x, y) for x, y in zip(mean, delta, strict=True) if x is not None]
        groups.append((one["name"], tone(place), points))
        rows += [[one["name"], one["l0"], i, last[i], mean[i], delta[i]] for i in range(len(delta))]
    axes = (f"{_MEANING[quantity]}, mean over the prompt", "Δln p")
    svg = task_figures.scatter(
        f"cloze-{quantity}", f"Δln p against {quantity}", groups, axes, log_x=quantity != "l0"
    )
    return Shown(
        f"cloze_delta_by_{quantity}",
        f"Δln p against {_MEANING[quantity]}",
        "A dot per prompt and dictionary, below 0 where its answer becomes less likely, in nats; at most "
        f"{task_figures.MAX_DOTS} of each are drawn. The table below has rank correlations of all.",
        ["dictionary", "L0", "prompt", "last token", "mean over the prompt", "Δln p"],
        rows,
        Markup(svg),
        legend=keyed(_named(record)),
    )


def _spearman(record: Record) -> Shown:
    names = list(record["dictionaries"][0]["spearman"])
    rows: list[list[object]] = [
        [one["name"], one["l0"], *(one["spearman"][name] for name in names)] for one in record["dictionaries"]
    ]
    return Shown(
        "cloze_spearman",
        "Rank correlation with Δln p",
        "Spearman's, over prompts: −1 where the answer suffers the more, the larger the figure is.",
        ["dictionary", "L0", *(f"{_MEANING[n.split('_')[0]]}, {n.split('_')[1]}" for n in names)],
        rows,
    )
