"""What is shown of error propagation (`propagation.py`)."""

from string import ascii_lowercase
from typing import Any

from penstock.trainer.judging.drawing import BAND, matrix
from penstock.trainer.judging.shown import Shown, with_l0

QUANTITIES = (
    (
        "stream_error",
        "Error of the stream",
        "Σ‖x_spliced − x_clean‖² / Σ‖x_clean‖² of what the measured dictionary reads: 0 without any error, "
        "and growing to the right where layers amplify it",
    ),
    (
        "squared_error",
        "Squared error",
        "Of the measured dictionary, spliced over clean: above 1 it meets activations unlike those it knows",
    ),
    ("l0", "L0", "Of the measured dictionary, spliced over clean: 1 where as many features are active"),
    (
        "norm",
        "Norm",
        "‖x‖ that the measured dictionary reads, spliced over clean: 1 where nothing changes it",
    ),
)


def show(record: dict[str, Any]) -> list[Shown]:
    """A matrix per quantity, a row per spliced dictionary and a column per measured one; the control."""
    if not record:
        return []
    return [*(_matrix(record, *quantity) for quantity in QUANTITIES), _controls(record)]


def _matrix(record: dict[str, Any], quantity: str, title: str, note: str) -> Shown:
    dictionaries = record["dictionaries"]
    labels = short_labels([one["hook_name"] for one in dictionaries])
    cells: list[list[float | None]] = [[None] * len(dictionaries) for _ in dictionaries]
    rows: list[list[object]] = []
    for cell in record["cells"]:
        spliced, measured = dictionaries[cell["row"]], dictionaries[cell["column"]]
        mean, error = cell["relative"][quantity]["mean"], cell["relative"][quantity]["error"]
        cells[cell["row"]][cell["column"]] = mean
        band = [None, None] if mean is None or error is None else [mean - BAND * error, mean + BAND * error]
        pair = ([one["name"], one["hook_out"], one["l0"]] for one in (spliced, measured))
        values: list[object] = [mean, error, *band]
        if quantity != "stream_error":
            values += [measured["clean"][quantity]["mean"], cell["values"][quantity]["mean"]]
        rows.append([*next(pair), *next(pair), *values])
    told = "; ".join(
        f"{cell['spliced']} to {cell['measured']}: {value:.3g}"
        for cell in record["cells"]
        if (value := cell["relative"][quantity]["mean"]) is not None
    )
    key = ", ".join(
        f"{label} is {with_l0(one['name'], one['l0'])}"
        for label, one in zip(labels, dictionaries, strict=True)
    )
    svg = matrix(
        *(f"propagation {quantity}", f"{title} behind spliced dictionaries. {told}", labels, labels, cells),
        ("layer of the measured dictionary", "spliced"),
    )
    columns = [
        *("spliced", "its hook point", "its l0", "measured", "hook point", "l0"),
        *("relative", "standard error", "low", "high"),
        *(() if quantity == "stream_error" else ("clean", "spliced value")),
    ]
    name = f"propagation-{quantity}"
    return Shown(name, f"{title} behind spliced dictionaries", f"{note}. {key}", columns, rows, svg)


def _controls(record: dict[str, Any]) -> Shown:
    rows: list[list[object]] = [[hook, value] for hook, value in record["controls"].items()]
    note = (
        "Largest relative squared error of any row of the first batch behind an identity: 0 but for rounding"
    )
    return Shown(
        "propagation-controls", "Control of the error propagation", note, ["hook point", "stream error"], rows
    )


def short_labels(hooks: list[str]) -> list[str]:
    """Few letters for the dictionary at each hook point: its layer, and a letter where layers repeat."""
    layers = [_layer(hook) for hook in hooks]
    if len(set(layers)) == len(layers):
        return layers
    labels, met = [], dict[str, int]()
    for layer in layers:
        number = met[layer] = met.get(layer, -1) + 1
        alone = layers.count(layer) == 1
        labels.append(layer if alone else layer + _letters(number))
    return labels


def _letters(number: int) -> str:
    """a … z, aa, ab …"""
    first, last = divmod(number, len(ascii_lowercase))
    return (_letters(first - 1) if first else "") + ascii_lowercase[last]


def _layer(hook: str) -> str:
    parts = hook.split(".")
    return parts[1] if parts[0] == "blocks" and len(parts) > 1 else parts[0].removeprefix("hook_")[:6]
