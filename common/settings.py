"""Settings: strict, frozen pydantic models, parsed once at the edge.

Each room defines the models beside what they configure; every field has a description with its unit.
Unknown keys are refused with the nearest known one.
"""

import json
import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from penstock.common.errors import ConfigError, nearest


class Settings(BaseModel):
    """Base of every settings model."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Takes 1e-3 for a number, as YAML 1.2 does; PyYAML takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_UNPARSABLE = (
    *(yaml.YAMLError, ValueError, RecursionError),
    # PyYAML says it so when a value does not fit the tag before it, as in `!!int ''` and `!!bool maybe`
    *(LookupError, AttributeError, TypeError, OverflowError),
)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file that holds a mapping.

    Raises:
        ConfigError: missing, unreadable, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; give the path of a config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except _UNPARSABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        what = (
            str(error) if isinstance(error, (yaml.YAMLError, ValueError)) else "a value that cannot be read"
        )
        raise ConfigError(f"{path}: not valid YAML{where}: {one_line(what)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, not {type(data).__name__}")
    return data


def parse(model: type[S], data: dict[str, Any], source: str) -> S:
    """Validate settings.

    Args:
        source: where the data came from, for the message.

    Raises:
        ConfigError: one line that names the field, what is wrong and the nearest known name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error)}") from error


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # an unknown key explains a missing one more often than the other way round
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    location = [one_line(str(part), 60) for part in problem["loc"]]
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        hint = nearest(location[-1], known) or f" Known: {', '.join(sorted(known))}."
        text = f"{field}: unknown setting.{hint}"
    elif problem["type"] == "missing":
        text = f"{field}: missing; it must be given"
    elif problem["type"] == "value_error":
        text = f"{field}: {problem['ctx']['error']}" if field else str(problem["ctx"]["error"])
    else:
        message = problem["msg"][0].lower() + problem["msg"][1:]
        text = f"{field}: {one_line(message, 200)}, not {one_line(_brief(problem.get('input')), 60)}"
    more = len(problems) - 1
    return one_line(text) + (f" (and {more} more)" if more else "")


class _Brief(reprlib.Repr):
    """`repr` at a bounded cost: aliases make small files stand for values without end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a number of hundreds of digits"


_brief = _Brief().repr


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the settings known at a location inside a settings model."""
    candidates: list[Any] = [model]
    for part in location:
        following: list[Any] = []
        for candidate in candidates:
            fields = getattr(candidate, "model_fields", {})
            if part in fields:
                following += _models_in(fields[part].annotation)
            elif isinstance(part, str):
                # the tag of a discriminated union, such as an architecture
                following += [candidate] if _has_tag(candidate, part) else []
        candidates = following or candidates
    return {name for candidate in candidates for name in candidate.model_fields}


def _has_tag(model: Any, tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in model.model_fields.values())


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def one_line(text: str, limit: int = 500) -> str:
    """Text fit for a message of one line: nothing that breaks it, steers a terminal or is endless."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
