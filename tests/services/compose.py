"""compose.yaml as Docker Compose reads it: interpolated, merged and checked, without Docker.

The models know what our file uses and refuse the rest, so that a misspelled key is found. What they mean is
the Compose specification's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "deploy" / "compose"
COMPOSE = DIRECTORY / "compose.yaml"

_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<how>:-|:\?)(?P<rest>[^}]*))?\})")


class MissingVariable(Exception):
    """A variable that must be set is not."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Seconds = Annotated[float, BeforeValidator(lambda text: _seconds(str(text)))]


class Build(_Strict):
    context: str
    dockerfile: str
    target: str
    args: dict[str, str] = {}


class HealthCheck(_Strict):
    test: list[str] = []
    interval: Seconds = 30.0
    timeout: Seconds = 30.0
    retries: int = 3
    disable: bool = False


class Dependency(_Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Device(_Strict):
    driver: str
    device_ids: list[str]
    capabilities: list[str]


class Reservations(_Strict):
    devices: list[Device]


class Resources(_Strict):
    reservations: Reservations


class Deploy(_Strict):
    replicas: Annotated[int, BeforeValidator(int)] = 1
    resources: Resources | None = None


class Logging(_Strict):
    driver: str
    options: dict[str, str]


class ServiceNetwork(_Strict):
    aliases: list[str] = []


class Network(_Strict):
    internal: bool = False


class Volume(_Strict):
    pass


class Mount(_Strict):
    """`source:target[:ro]`: a file of the host, or a volume."""

    source: str
    target: str
    read_only: bool

    @property
    def is_volume(self) -> bool:
        return not self.source.startswith((".", "/"))

    @property
    def path(self) -> Path:
        """Where a source that is no volume lies."""
        return (DIRECTORY / self.source).resolve()


def _mount(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    source, target, *options = text.split(":")
    assert options in ([], ["ro"]), text
    return {"source": source, "target": target, "read_only": bool(options)}


class Service(_Strict):
    image: str
    build: Build | None = None
    profiles: list[str] = []
    user: str | None = None
    read_only: bool = False
    cap_drop: list[str] = []
    security_opt: list[str] = []
    tmpfs: list[str] = []
    command: list[str] = []
    environment: dict[str, str] = {}
    volumes: list[Annotated[Mount, BeforeValidator(_mount)]] = []
    networks: Annotated[
        dict[str, ServiceNetwork],
        BeforeValidator(lambda found: {name: {} for name in found} if isinstance(found, list) else found),
    ] = {}
    ports: list[str] = []
    restart: Literal["no", "on-failure", "unless-stopped", "always"] = "no"
    stop_grace_period: Seconds = 10.0
    depends_on: dict[str, Dependency] = {}
    healthcheck: HealthCheck | None = None
    deploy: Deploy = Deploy()
    logging: Logging | None = None

    @property
    def is_penstock(self) -> bool:
        return self.image.startswith("penstock:")


class Compose(_Strict):
    name: str
    services: dict[str, Service]
    networks: dict[str, Network] = {}
    volumes: dict[str, Volume] = {}
    extensions: dict[str, Any] = Field({}, exclude=True)

    def profile(self, *profiles: str) -> dict[str, Service]:
        """The services that `--profile` (repeated) starts."""
        return {
            name: service
            for name, service in self.services.items()
            if not service.profiles or set(profiles) & set(service.profiles)
        }


def variables(text: str) -> set[str]:
    """Names of all variables that a file is interpolated with."""
    return {match["name"] for match in _VARIABLE.finditer(_without_comments(text)) if match["name"]}


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$`, as Compose has them.

    Raises:
        MissingVariable: with the file's message.
    """

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        found = environment.get(match["name"], "")
        if match["how"] == ":-":
            return found or str(match["rest"])
        if match["how"] == ":?" and not found:
            raise MissingVariable(match["rest"])
        return found

    return _VARIABLE.sub(value, text)


def load_compose(environment: Mapping[str, str]) -> Compose:
    """Our compose.yaml, in an environment (that of `.env`)."""
    data = yaml.safe_load(_without_comments(COMPOSE.read_text()))
    data = {key: value for key, value in data.items() if not key.startswith("x-")}
    return Compose.model_validate(interpolated(data, environment))


def example_environment() -> dict[str, str]:
    """`.env.example`."""
    lines = (DIRECTORY / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated(data: Any, environment: Mapping[str, str]) -> Any:
    """What a YAML file holds, its texts interpolated."""
    # value by value: Compose interpolates after it has parsed, so no value can change the structure
    if isinstance(data, dict):
        return {key: interpolated(value, environment) for key, value in data.items()}
    if isinstance(data, list):
        return [interpolated(value, environment) for value in data]
    return interpolate(data, environment) if isinstance(data, str) else data


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        units = {"s": 1.0, "m": 60.0, "h": 3600.0}
        return float(text[:-1]) * units[text[-1]]
