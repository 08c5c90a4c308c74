"""The operations guide and the pages around it: whatever they tell people to type or to look for exists."""

import re
from pathlib import Path

import click
import pytest
import yaml

from penstock.common.health import STALLED_AFTER_SECONDS
from penstock.common.redis import RedisSettings
from penstock.common.settings import Settings
from penstock.deploy.cli import cli
from penstock.deploy.config import Config
from penstock.store.layout import BLOCK_CHUNKS
from penstock.store.queue import FEED_AHEAD
from penstock.trainer.worker import REDIS_PATIENCE_SECONDS
from services.compose import DIRECTORY, ROOT, Compose, example_environment, load_compose
from services.guide import OPERATORS, Line, anchors, commands, links, said, spans
from services.metric_names import everything

GUIDE = ROOT / "docs" / "operations.md"
LINES = [line for page in OPERATORS for line in commands(page)]
TAKES_A_VALUE = {"--tail", "--since", "--timeout"}
OF_DOCKER_RUN = {"--env", "--volume", "--network", "--tmpfs", "--gpus", "--restart", "--stop-timeout"}
ELSEWHERE = {"AWS_PROFILE", "AWS_CA_BUNDLE", "HF_HUB_OFFLINE", "PENSTOCK_CONFIG"}


@pytest.fixture(scope="module")
def compose() -> Compose:
    secrets = dict.fromkeys(("VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "GRAFANA_PASSWORD"), "x")
    return load_compose(example_environment() | secrets)


def unknown(arguments: tuple[str, ...], exact: bool) -> str | None:
    """What is wrong with the arguments of `penstock`, if anything is."""
    name = arguments[0]
    if name not in cli.commands:
        return f"no command {name}"
    command = cli.commands[name]
    if not exact:
        # a span may leave arguments away, but what it has must exist
        options = {option for parameter in command.params for option in parameter.opts}
        strange = [word for word in arguments if word.startswith("--") and word not in options]
        return f"no option {strange}" if strange else None
    try:
        command.make_context(name, list(arguments[1:]))
    except click.ClickException as error:
        return error.format_message()
    return None


def of_penstock(line: Line) -> tuple[str, ...] | None:
    """The arguments of `penstock` in a line, wherever it runs."""
    words = line.words
    if "COMMAND" in words or "…" in "".join(words):
        return None
    if words[0] == "penstock":
        return words[1:]
    inside = words[words.index("exec") :] if "exec" in words else ()
    if "penstock" in inside:
        return inside[inside.index("penstock") + 1 :]
    if (rest := line.after("docker", "compose", "run")) is not None:
        return tuple(word for word in rest if word not in ("--rm", "--no-deps"))[1:]
    images = [i for i, word in enumerate(words) if word.startswith("penstock:")]
    return words[images[0] + 1 :] if words[:2] == ("docker", "run") and images else None


def services_of(line: Line) -> list[str]:
    """The services that a `docker compose` command names."""
    rest = line.after("docker", "compose")
    if not rest:
        return []
    what, *words = rest
    named, skip = [], False
    for word in words:
        if not skip and not word.startswith("-"):
            named.append(word)
        skip = word in TAKES_A_VALUE
    if what in ("run", "exec"):
        return named[:1]
    if what == "cp":
        return [word.split(":")[0] for word in named if ":" in word]
    return named


def test_the_lint_finds_what_does_not_exist() -> None:
    assert unknown(("statsu", "CONFIG"), True)
    assert unknown(("verify", "URL", "--yes"), True)
    assert unknown(("verify",), True)
    assert unknown(("plan", "--gpu-hours", "P"), False)
    assert unknown(("plan", "CONFIG", "--gpu-hour", "P"), True)
    assert unknown(("rm", "URL", "--yes"), True) is None


def test_every_command_is_one_and_takes_these_arguments() -> None:
    checked = [(line, found) for line in LINES if (found := of_penstock(line))]
    assert len(checked) > 60
    wrong = [f"{line}: {why}" for line, found in checked if (why := unknown(found, line.exact))]
    assert wrong == []


def test_every_service_is_one(compose: Compose) -> None:
    named = {(str(line), name) for line in LINES for name in services_of(line)}
    assert len(named) > 20
    assert {(line, name) for line, name in named if name not in compose.services} == set()


def test_what_is_mounted_and_set_in_containers_is_what_compose_has(compose: Compose) -> None:
    trainer = compose.services["trainer"]
    for line in (line for line in LINES if line.exact and line.words[:2] == ("docker", "run")):
        words = list(line.words)
        assert {word for word in words if word.startswith("--") and "=" not in word} <= OF_DOCKER_RUN | {
            *("--detach", "--read-only", "--rm"),
            *words[next((i for i, word in enumerate(words) if word.startswith("penstock:")), len(words)) :],
        }, line
        given = {words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--env"}
        assert given <= trainer.environment.keys(), line
        images = {word for word in words if word.startswith("penstock:")}
        assert images <= {service.image for service in compose.services.values()}, line
    text = GUIDE.read_text()
    there = {f"{compose.name}_{name}" for name in (*compose.networks, *compose.volumes)}
    assert set(re.findall(r"--network (\w+)", text)) <= there
    assert "penstock_objects" in there
    assert "sed -n 's/^S3_ACCESS_KEY=//p' .env" in text
    assert "S3_ACCESS_KEY" in example_environment()
    out = re.search(r"--out (\S+)\n.*exporter:(\S+)", text)
    assert out
    assert out[1] == out[2]
    mounted = {
        service: {mount.source: mount.target for mount in compose.services[service].volumes}
        for service in ("trainer", "exporter")
    }
    assert mounted["trainer"]["state"] == mounted["exporter"]["state"] == str(Path(out[1]).parent)


def test_secrets_of_kubernetes_are_those_that_are_made() -> None:
    listed = {
        secret["metadata"]["name"]: set(secret["stringData"])
        for secret in yaml.safe_load_all((ROOT / "deploy/kubernetes/secrets.example.yaml").read_text())
    }
    made = {}
    for line in LINES:
        rest = line.after("kubectl", "--namespace", "penstock", "create", "secret", "generic")
        if rest and line.page == GUIDE.name:
            keys = [word.split("=")[1] for word in rest if word.startswith("--from-literal=")]
            made[rest[0]] = set(keys)
    assert made == listed


def test_kubernetes_commands_say_where_and_name_what_is_there() -> None:
    base = ROOT / "deploy" / "kubernetes"
    objects = {
        (found["kind"].lower(), found["metadata"]["name"])
        for file in base.rglob("*.yaml")
        for found in yaml.safe_load_all(file.read_text())
        if isinstance(found, dict) and "metadata" in found
    }
    lines = [line for line in LINES if line.words[0] == "kubectl" and line.exact]
    assert len(lines) > 8
    for line in lines:
        for word in line.words:
            if "/" in word and re.fullmatch(r"\w+/\w+", word):
                assert tuple(word.split("/")) in objects, line
            if word.startswith("deploy/"):
                assert (ROOT / word / "kustomization.yaml").is_file(), line
        if "scaledobject" in line.words:
            assert ("scaledobject", line.words[line.words.index("scaledobject") + 1]) in objects, line
        anywhere = line.words[1:3] == ("create", "namespace") or "--kustomize" in line.words
        assert anywhere or line.words[1] == "--namespace", line


def test_every_metric_exists(compose: Compose) -> None:
    known = everything()
    of_docker = {f"{compose.name}_{name}" for name in (*compose.networks, *compose.volumes)}
    for page in OPERATORS:
        for name in re.findall(r"\b(?:sae|penstock)_[a-z0-9_]*[a-z0-9]\b", page.read_text()):
            assert any(there.startswith(name) for there in known) or name in of_docker, f"{page.name}: {name}"


def test_what_is_said_to_be_read_in_logs_is_said_by_the_code() -> None:
    texts = said()
    table = GUIDE.read_text().split("## Troubleshooting by symptom")[1]
    phrases = [
        span
        for span in re.findall(r"`([^`]+)`", table)
        if " " in span and not re.match(r"(penstock|docker|kubectl) ", span)
    ]
    phrases += [
        phrase
        for line in LINES
        if line.words[:3] == ("docker", "compose", "logs")
        for phrase in _searched(line)
    ]
    assert len(phrases) > 10
    for phrase in phrases:
        pattern = ".*".join(re.escape(part.strip()) for part in phrase.split("…") if part.strip())
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), phrase


def _searched(line: Line) -> list[str]:
    page = next(page for page in OPERATORS if page.name == line.page)
    return [
        phrase
        for found in re.findall(r"docker compose logs .*\| grep -E '([^']+)'", page.read_text())
        for phrase in found.split("|")
    ]


def test_every_setting_exists() -> None:
    for page in OPERATORS:
        for section, name in re.findall(r"`(\w+)\.(\w+)[`:]", page.read_text()):
            field = Config.model_fields.get(section)
            kind = field.annotation if field is not None else None
            if isinstance(kind, type) and issubclass(kind, Settings):
                assert name in kind.model_fields, f"{page.name}: {section}.{name}"


def test_every_variable_exists(compose: Compose) -> None:
    known = set(example_environment()) | compose.services["trainer"].environment.keys() | ELSEWHERE
    named = {span.split("=")[0] for span in spans(GUIDE) if re.fullmatch(r"[A-Z]+_[A-Z_]+(=.*)?", span)}
    assert len(named) >= 8
    assert named <= known


def test_every_file_exists() -> None:
    for page in OPERATORS:
        for span in spans(page):
            if re.fullmatch(r"(deploy|docs|base|components|common|tests|examples)/[\w./-]+", span):
                places = [ROOT / span, ROOT / "deploy" / "kubernetes" / span]
                assert any(place.exists() for place in places), f"{page.name}: {span}"
            if re.fullmatch(r"\.?/?(cpu|gpu|compose)\.yaml", span):
                assert (DIRECTORY / span).is_file(), f"{page.name}: {span}"


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))], ids=str
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


def test_figures_are_those_of_the_code(compose: Compose) -> None:
    text = " ".join(GUIDE.read_text().split())
    for phrase in (
        f"no progress for {STALLED_AFTER_SECONDS:.0f} s",
        f"idle trainers wait up to {REDIS_PATIENCE_SECONDS:.0f} s",
        f"(`redis.lease_seconds`, {RedisSettings().lease_seconds:.0f} s)",
        f"at most {FEED_AHEAD:,} of them",
        f"one index object per {BLOCK_CHUNKS:,} chunks",
        f"are {compose.services['trainer'].stop_grace_period:.0f} s. They must exceed",
    ):
        assert phrase in text, phrase
