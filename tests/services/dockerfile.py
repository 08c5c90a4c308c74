"""A Dockerfile as far as ours goes: stages and their instructions, variables filled in."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from services.compose import ROOT

DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"

_KNOWN = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"),
    *("RUN", "USER", "VOLUME", "WORKDIR"),
}


@dataclass
class Stage:
    """What one FROM begins; `steps` are (instruction, rest of the line), those of its base not included."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [rest for word, rest in self.steps if word == instruction]


def read_dockerfile(path: Path = DOCKERFILE) -> tuple[dict[str, str], dict[str, Stage]]:
    """The ARGs before the first FROM with their defaults, and all stages by name."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, (line.strip() for line in lines)):
        word, _, rest = line.partition(" ")
        assert word in _KNOWN, line
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(name, _fill(base, arguments))
        elif current is None:
            assert word == "ARG", line
            name, _, default = rest.partition("=")
            arguments[name] = default
        else:
            current.steps.append((word, rest.strip()))
    return arguments, stages


def line_of(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those it is FROM, the first one first."""
    found: list[Stage] = []
    at: str | None = name
    while at in stages:
        found.insert(0, stages[at])
        at = stages[at].base
    return found


def effective(stages: dict[str, Stage], name: str, instruction: str) -> str:
    """An instruction of which the last one counts, as an image has it."""
    return [rest for stage in line_of(stages, name) for rest in stage.all(instruction)][-1]


def environment(stages: dict[str, Stage], name: str) -> dict[str, str]:
    """ENV of an image."""
    found: dict[str, str] = {}
    for stage in line_of(stages, name):
        for rest in stage.all("ENV"):
            found |= dict(pair.split("=", 1) for pair in rest.split())
    return found


def health_command(stages: dict[str, Stage], name: str) -> list[str]:
    """What HEALTHCHECK runs."""
    _, _, command = effective(stages, name, "HEALTHCHECK").partition("CMD ")
    found = json.loads(command)
    assert isinstance(found, list)
    return found


def context_files(ignore: Path = ROOT / ".dockerignore") -> set[Path]:
    """Files of the repository, tracked or not, that a build gets to see; relative to the root."""
    rules = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "an allow-list begins with *"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    refused = [_pattern(rule) for rule in rules[1:] if not rule.startswith("!")]
    found: set[Path] = set()
    for name in allowed:
        top = ROOT / name
        found |= {path for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()}
    relative = {path.relative_to(ROOT) for path in found}
    return {path for path in relative if not any(rule.search(str(path)) for rule in refused)}


def _pattern(rule: str) -> re.Pattern[str]:
    """A pattern of .dockerignore; what matches a directory matches all below it."""
    parts = [
        "(.*/)?" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/"
        for part in rule.split("/")
    ]
    return re.compile("^" + "".join(parts).removesuffix("/") + "(/|$)")


def _fill(text: str, arguments: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], text)
