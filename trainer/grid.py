"""Grids of dictionaries: one entry of a config that stands for many SAEs.

An entry has an SAE's settings, each either one value or several: a list, or a range on a logarithmic scale.
It expands to every combination while the config is parsed, so that nothing after that knows of grids.
`docs/sweeps.md` has the notation.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import Field, ValidationError

from penstock.common.errors import nearest
from penstock.common.settings import Settings, one_line
from penstock.trainer.kinds import KINDS, SAESettings

MAX_SAES = 10_000
"""What a grid may expand to; each SAE needs memory and time of its own."""

_RANGES = {"log10": 10.0, "log2": 2.0, "ln": math.e}
_SHORT = {
    "l1_coefficient": "l1-",
    "alpha": "a",
    "d_sae": "d",
    "size_ratio": "r",
    "seed": "s",
    "hook_name": "",
}
_ALTERNATIVES = {"alpha": "l1_coefficient", "size_ratio": "d_sae"}
"""Spellings that only grids have, and what they become."""


class _Ranged(float):
    """A value of a range; settings that count something take it rounded."""


class GridFrame(Settings):
    """What `size_ratio` and `alpha` are relative to."""

    features: int = Field(ge=1)
    """Number of true features (G); `d_sae` is `size_ratio` times it."""
    d_in: int = Field(ge=1)
    """Width of the rows (D)."""
    mean_square: float = Field(gt=0)
    """Mean ‖x‖² of the rows, which the input scale brings to D."""

    def l1_coefficient(self, alpha: float, d_sae: int) -> float:
        """λ of the report's α.

        Its loss is mean_rows,dims (x − x̂)² + α · mean_rows ‖f‖₁ / d_sae on rows as they are. Times D, and on
        rows scaled by s = √(D / mean ‖x‖²), it is ours with λ = s · α · D / d_sae, times 1 / s².
        """
        return alpha * self.d_in / d_sae * math.sqrt(self.d_in / self.mean_square)


def expand_grid(entries: object, frame: GridFrame | None = None) -> list[SAESettings]:
    """All SAEs that a run's `grid` stands for, in order: the last setting of an entry varies fastest.

    Args:
        frame: for entries that have no `relative_to` of their own.

    Raises:
        ValueError: one line, naming the entry and the setting.
    """
    if not isinstance(entries, list):
        raise ValueError("grid: must be a list of entries, each a mapping of an SAE's settings")
    found: dict[str, SAESettings] = {}
    total = 0
    for number, entry in enumerate(entries):
        where = f"grid[{number}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: must be a mapping of an SAE's settings")
        kinds = _kinds(entry, where)
        choices, own = _choices(dict(entry), kinds, where)
        total += sum(math.prod(len(v) for k, v in choices.items() if _takes(kind, k)) for kind in kinds)
        if total > MAX_SAES:
            raise ValueError(f"{where}: makes {total} SAEs; at most {MAX_SAES} fit a run: give fewer values")
        for sae in _expand(choices, kinds, own or frame, where):
            if sae.name in found:
                raise ValueError(
                    f"{where}: the name {sae.name!r} comes up twice; give the entry a name of its own, or "
                    "values that differ in their first four digits"
                )
            found[sae.name] = sae
    return list(found.values())


def _choices(
    entry: dict[str, Any], kinds: list[str], where: str
) -> tuple[dict[str, list[Any]], GridFrame | None]:
    """Setting -> its values, and what is relative to what."""
    frame = None
    if (told := entry.pop("relative_to", None)) is not None:
        try:
            frame = GridFrame.model_validate(told)
        except ValidationError as error:
            raise ValueError(f"{where}: relative_to.{_first(error)}") from error
    if "name" in entry and not isinstance(entry["name"], str):
        raise ValueError(f"{where}: name: must be text that the names begin with")
    for other, plain in _ALTERNATIVES.items():
        if other in entry and plain in entry:
            raise ValueError(f"{where}: {other} and {plain} say the same; give one of them")
    choices = {}
    for key, value in entry.items():
        one = [value] if isinstance(value, list) and _is_list_of_its_own(key, value, kinds) else value
        choices[key] = _values(one, f"{where}: {key}")
    return choices, frame


def _is_list_of_its_own(key: str, value: list[Any], kinds: list[str]) -> bool:
    """Whether a list is one value: of a setting that takes lists, and not a list of those."""
    fields = (KINDS[kind].Settings.model_fields.get(key) for kind in kinds)
    takes_lists = any(field is not None and get_origin(field.annotation) is list for field in fields)
    return takes_lists and not all(isinstance(item, list) for item in value)


def _values(value: object, where: str) -> list[Any]:
    """The values of one setting: those of a list, of a range, or the one that is given."""
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{where}: an empty list makes no SAE; give at least one value")
        if len(set(map(repr, value))) != len(value):
            raise ValueError(f"{where}: a value is given twice")
        return value
    return _range(value, where) if isinstance(value, Mapping) else [value]


def _range(told: Mapping[str, Any], where: str) -> list[float]:
    """`{log10: [a, b], n: N}`: N values from 10^a to 10^b whose logarithms are evenly spaced.

    They are rounded to six digits, so that every machine has the same ones.
    """
    way = [key for key in told if key in _RANGES]
    form = f"a range is {{log10: [from, to], n: how many}}, with {', '.join(_RANGES)} of the values"
    if unknown := [str(key) for key in told if key not in _RANGES and key != "n"]:
        hint = nearest(unknown[0], [*_RANGES, "n"])
        raise ValueError(f"{where}.{one_line(unknown[0], 60)}: unknown setting.{hint} {form}")
    if len(way) != 1 or "n" not in told:
        raise ValueError(f"{where}: {form}")
    ends, n = told[way[0]], told["n"]
    if not (isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)):
        raise ValueError(f"{where}.{way[0]}: must be two numbers, the exponents of the first and last value")
    if isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= MAX_SAES:
        raise ValueError(f"{where}.n: must be a whole number from 2 to {MAX_SAES}")
    if ends[0] == ends[1] or max(map(abs, ends)) > 300:
        raise ValueError(f"{where}.{way[0]}: the exponents must differ, and be at most 300")
    low, high = ends
    exponents = (low + (high - low) * i / (n - 1) for i in range(n))
    return [_Ranged(f"{_RANGES[way[0]] ** exponent:.6g}") for exponent in exponents]


def _kinds(entry: Mapping[str, Any], where: str) -> list[str]:
    """The entry's architectures; refuses what none of them has."""
    if "architecture" not in entry:
        raise ValueError(f"{where}: architecture: missing; it must be given")
    architectures = _values(entry["architecture"], f"{where}: architecture")
    for name in architectures:
        if not isinstance(name, str) or name not in KINDS:
            there = ", ".join(sorted(KINDS))
            raise ValueError(f"{where}: architecture: {one_line(str(name), 60)!r} is not one of {there}")
    known = {*_ALTERNATIVES, "relative_to"} | {
        f for a in architectures for f in KINDS[a].Settings.model_fields
    }
    known -= {f for f in _ALTERNATIVES if _ALTERNATIVES[f] not in known}
    for key in entry:
        if key not in known:
            hint = nearest(str(key), known) or f" Known: {', '.join(sorted(known))}."
            raise ValueError(f"{where}: {one_line(str(key), 60)}: unknown setting.{hint}")
    return architectures


def _takes(kind: str, key: str) -> bool:
    """Whether SAEs of a kind have a setting, by one name or the other."""
    return _ALTERNATIVES.get(key, key) in KINDS[kind].Settings.model_fields and key != "architecture"


def _expand(
    choices: dict[str, list[Any]], kinds: list[str], frame: GridFrame | None, where: str
) -> Iterator[SAESettings]:
    for kind in kinds:
        own = {key: values for key, values in choices.items() if _takes(kind, key)}
        for combination in itertools.product(*own.values()):
            told = dict(zip(own, combination, strict=True))
            name = _name(kind, told, {key for key, values in own.items() if len(values) > 1})
            yield _settings(kind, name, told, frame, where)


def _settings(kind: str, name: str, told: dict[str, Any], frame: GridFrame | None, where: str) -> SAESettings:
    fields: dict[str, Any] = {key: value for key, value in told.items() if key not in _ALTERNATIVES}
    for key in _ALTERNATIVES.keys() & told.keys():
        if frame is None:
            raise ValueError(
                f"{where}: {key}: relative to what? Give relative_to: {{features, d_in, mean_square}}, as a "
                "config with a toy source does by itself"
            )
        if not _is_number(told[key]):
            raise ValueError(f"{where}: {key}: must be a number, not {one_line(repr(told[key]), 60)}")
    if "size_ratio" in told and frame is not None:
        fields["d_sae"] = max(1, round(told["size_ratio"] * frame.features))
    settings = KINDS[kind].Settings
    for key, value in fields.items():
        if isinstance(value, _Ranged):
            counts = settings.model_fields[key].annotation is int
            fields[key] = round(value) if counts else float(value)
    if "alpha" in told and frame is not None and isinstance(fields.get("d_sae"), int):
        value = frame.l1_coefficient(told["alpha"], max(1, fields["d_sae"]))
        fields["l1_coefficient"] = float(f"{value:.10g}")
    try:
        return settings.model_validate(fields | {"architecture": kind, "name": name})
    except ValidationError as error:
        raise ValueError(f"{where}: {_first(error)}") from error


def _name(kind: str, told: dict[str, Any], varying: set[str]) -> str:
    """What tells an SAE from the others of its entry: `standard-l1-0.1-d512-s0`."""
    parts = [str(told.get("name", kind))]
    parts += [kind] if "name" in told and "architecture" in varying else []
    for key, value in told.items():
        if key in varying:
            parts.append(_SHORT.get(key, f"{key}-" if len(key) > 2 else key) + _shown(value))
    return "-".join(parts)


def _shown(value: object) -> str:
    text = f"{value:.4g}" if _is_number(value) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.replace("+", ""))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(error: ValidationError) -> str:
    """The first problem, as a line."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{field}: missing; it must be given"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}: {message}, not {one_line(repr(problem.get('input')), 60)}"
