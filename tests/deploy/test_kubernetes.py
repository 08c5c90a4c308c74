"""The Kubernetes manifests: valid by the official schemas; whatever they name exists on the other side."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from penstock.common import metrics
from penstock.deploy.cli import cli
from penstock.deploy.config import load_config
from services.compose import DIRECTORY, ROOT, load_compose
from services.dockerfile import effective, environment, read_dockerfile
from services.kustomize import (
    KUBERNETES,
    OVERLAYS,
    Object,
    build,
    containers,
    identity,
    load_all,
    pod_of,
)

_, STAGES = read_dockerfile()
COMPOSE = load_compose(
    dict.fromkeys(("VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "GRAFANA_PASSWORD"), "x")
)
VERSIONS = ("1.29", "1.37")
"""Kubernetes from and to which manifests are checked."""


@pytest.fixture(params=OVERLAYS, scope="module")
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return build(KUBERNETES / "overlays" / request.param)


def ours(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """(workload, container) of Penstock itself."""
    for found in objects:
        for container in containers(found):
            if container["image"].startswith("penstock:"):
                yield found, container


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def selected(objects: list[Object], labels: dict[str, str]) -> list[Object]:
    """Workloads whose pods have all these labels."""
    pods = [(found, pod) for found in objects if (pod := pod_of(found)) is not None]
    return [found for found, pod in pods if labels.items() <= pod["metadata"]["labels"].items()]


# ---- schemas


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid_by_the_official_schemas(objects: list[Object], version: str) -> None:
    kubernetes_validate = _kubernetes_validate()
    checked = 0
    for found in objects:
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(found, version, strict=True)
            checked += 1
    assert checked >= 14


def test_the_schemas_refuse_a_misspelled_field(objects: list[Object]) -> None:
    kubernetes_validate = _kubernetes_validate()
    trainer = yaml.safe_load(yaml.safe_dump(of_kind(objects, "Deployment")["trainer"]))
    trainer["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(trainer, VERSIONS[-1], strict=True)


def _kubernetes_validate() -> Any:
    if os.environ.get("CI") == "true":
        import kubernetes_validate

        return kubernetes_validate
    return pytest.importorskip("kubernetes_validate", reason="make test installs kubernetes-validate")


class _Custom(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Custom):
    name: str
    namespace: str


class _Labels(_Custom):
    matchLabels: dict[str, str] = Field(min_length=1)  # noqa: N815


class _Endpoint(_Custom):
    port: str
    interval: str = Field(pattern=r"^\d+s$")


class _PodMonitorSpec(_Custom):
    selector: _Labels
    jobLabel: str  # noqa: N815
    podMetricsEndpoints: list[_Endpoint]  # noqa: N815


class PodMonitor(_Custom):
    apiVersion: Literal["monitoring.coreos.com/v1"]  # noqa: N815
    kind: Literal["PodMonitor"]
    metadata: _Metadata
    spec: _PodMonitorSpec


class _Prometheus(_Custom):
    serverAddress: str = Field(pattern=r"^https?://[a-z.-]+:\d+$")  # noqa: N815
    query: str
    # KEDA takes text for all of these
    threshold: str = Field(pattern=r"^\d+$")
    activationThreshold: str = Field(pattern=r"^\d+$")  # noqa: N815
    ignoreNullValues: Literal["false"]  # noqa: N815


class _Trigger(_Custom):
    type: Literal["prometheus"]
    metadata: _Prometheus


class _ScaleTarget(_Custom):
    name: str


class _ScaledObjectSpec(_Custom):
    scaleTargetRef: _ScaleTarget  # noqa: N815
    minReplicaCount: Literal[0]  # noqa: N815
    maxReplicaCount: int = Field(ge=1)  # noqa: N815
    pollingInterval: int = Field(ge=1)  # noqa: N815
    cooldownPeriod: int = Field(ge=0)  # noqa: N815
    advanced: dict[str, Any]
    triggers: list[_Trigger] = Field(min_length=1)


class ScaledObject(_Custom):
    apiVersion: Literal["keda.sh/v1alpha1"]  # noqa: N815
    kind: Literal["ScaledObject"]
    metadata: _Metadata
    spec: _ScaledObjectSpec


CUSTOM: dict[str, type[PodMonitor] | type[ScaledObject]] = {
    "PodMonitor": PodMonitor,
    "ScaledObject": ScaledObject,
}


def test_custom_objects_are_what_we_know_of_theirs(objects: list[Object]) -> None:
    found = [CUSTOM[o["kind"]].model_validate(o) for o in objects if o["kind"] in CUSTOM]
    assert found


def test_the_behaviour_of_autoscalers_is_valid_by_the_official_schema() -> None:
    """KEDA passes it on to a HorizontalPodAutoscaler as it is."""
    kubernetes_validate = _kubernetes_validate()
    for scaled in of_kind(build(KUBERNETES / "overlays" / "gpu"), "ScaledObject").values():
        advanced = scaled["spec"]["advanced"]
        assert set(advanced) == {"horizontalPodAutoscalerConfig"}
        made = {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "x"},
            "spec": {
                "scaleTargetRef": {"kind": "Deployment", "name": "x"},
                "maxReplicas": scaled["spec"]["maxReplicaCount"],
                **advanced["horizontalPodAutoscalerConfig"],
            },
        }
        kubernetes_validate.validate(made, VERSIONS[-1], strict=True)


# ---- references


def test_what_pods_refer_to_exists(objects: list[Object]) -> None:
    secrets = {
        o["metadata"]["name"]: set(o["stringData"]) for o in load_all(KUBERNETES / "secrets.example.yaml")
    }
    config_maps, claims = of_kind(objects, "ConfigMap"), of_kind(objects, "PersistentVolumeClaim")
    used_secrets: set[str] = set()
    used_maps: set[str] = set()
    for found in objects:
        pod = pod_of(found)
        if pod is None:
            continue
        assert pod["spec"]["serviceAccountName"] in of_kind(objects, "ServiceAccount")
        templates = {c["metadata"]["name"] for c in found["spec"].get("volumeClaimTemplates", ())}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                used_maps.add(volume["configMap"]["name"])
            elif "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            else:
                assert "emptyDir" in volume
        for container in containers(found):
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == set(volumes) | templates, identity(found)
            for variable in container.get("env", ()):
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in secrets[reference["name"]], reference
                used_secrets.add(reference["name"])
            used_maps |= {source["configMapRef"]["name"] for source in container.get("envFrom", ())}
    assert used_secrets == set(secrets)
    assert used_maps == set(config_maps)
    assert of_kind(objects, "Secret") == {}


def test_images_are_those_of_compose(objects: list[Object]) -> None:
    known = {service.image for service in COMPOSE.services.values()}
    assert {c["image"] for found in objects for c in containers(found)} <= known


def test_arguments_are_commands(objects: list[Object]) -> None:
    seen = set()
    for _, container in ours(objects):
        assert "command" not in container  # the image's entry point
        command, *arguments = container["args"]
        seen.add(command)
        found = cli.get_command(click.Context(cli), command)
        if command == "exporter" and not (ROOT / "deploy" / "exporter.py").exists():
            continue
        assert found is not None, command
        with click.Context(found, info_name=command) as context:
            found.parse_args(context, list(arguments))
        for path in arguments:
            assert path in ("/etc/penstock/penstock.yaml", "s3://penstock")
    assert {"corpus", "submit", "produce", "train", "exporter"} <= seen


def test_variables_are_documented_settings(objects: list[Object]) -> None:
    table = (ROOT / "docs" / "configuration.md").read_text().partition("## Environment variables")[2]
    documented = set(re.findall(r"`([A-Z0-9_]+)`", table))
    for _, container in ours(objects):
        assert {variable["name"] for variable in container["env"]} <= documented
    assert set(of_kind(objects, "ConfigMap")["penstock-environment"]["data"]) <= documented


def test_configs_are_valid_and_fit_the_pods(objects: list[Object], tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text(of_kind(objects, "ConfigMap")["penstock-config"]["data"][file.name])
    config = load_config(str(file))
    assert (config.metrics.host, config.metrics.port) == ("0.0.0.0", 9464)
    assert config.redis.url is None
    assert config.json_logs
    for url in (config.corpus.url, config.dataset.url, config.runs_url):
        assert url.startswith("s3://penstock/")
    for _, container in ours(objects):
        (port,) = container.get("ports", [{"name": "metrics", "containerPort": 9464}])
        assert port == {"name": "metrics", "containerPort": config.metrics.port}


def test_copies_are_what_compose_has() -> None:
    overlays = KUBERNETES / "overlays"
    assert (overlays / "cpu-single-node" / "valkey.conf").read_text() == (
        DIRECTORY / "valkey.conf"
    ).read_text()
    assert (overlays / "cpu-single-node" / "penstock.yaml").read_text() == (
        DIRECTORY / "cpu.yaml"
    ).read_text()
    assert (overlays / "gpu" / "penstock.yaml").read_text() == (DIRECTORY / "gpu.yaml").read_text()


def test_ports_are_open_on_the_other_side(objects: list[Object]) -> None:
    data = of_kind(objects, "ConfigMap")["penstock-environment"]["data"]
    services = of_kind(objects, "Service")
    for variable in ("PENSTOCK_REDIS_URL", "AWS_ENDPOINT_URL"):
        host, port = re.fullmatch(r"\w+://([\w.]+)(?::(\d+)(?:/\d+)?)?", data[variable]).groups()  # type: ignore[union-attr]
        port = int(port or 443)
        if "." not in host:
            (offered,) = services[host]["spec"]["ports"]
            assert offered["port"] == port
            (workload,) = selected(objects, services[host]["spec"]["selector"])
            (container,) = containers(workload)
            assert offered["targetPort"] in {p["name"] for p in container["ports"]}
            assert port in {p["containerPort"] for p in container["ports"]}
        # and the network lets it pass
        assert port in _egress_ports(objects, "trainer")
        assert port in _egress_ports(objects, "corpus")


def _egress_ports(objects: list[Object], component: str) -> set[int]:
    workloads = [o for o in objects if pod_of(o) is not None and o["metadata"]["name"] == component]
    found: set[int] = set()
    for policy in of_kind(objects, "NetworkPolicy").values():
        if workloads[0] in selected(objects, policy["spec"]["podSelector"]["matchLabels"]):
            found |= {p["port"] for rule in policy["spec"].get("egress", ()) for p in rule["ports"]}
    return found


def test_selectors_select(objects: list[Object]) -> None:
    for found in objects:
        if found["kind"] in ("Deployment", "StatefulSet"):
            assert selected(objects, found["spec"]["selector"]["matchLabels"]) == [found]
        elif found["kind"] == "PodDisruptionBudget":
            labels = found["spec"]["selector"]["matchLabels"]
            (guarded,) = selected(objects, labels)
            assert guarded["metadata"]["name"] == found["metadata"]["name"]
            # of pods whose controller has no scale, the disruption controller allows no eviction at all
            assert guarded["kind"] in ("Deployment", "StatefulSet")
        elif found["kind"] == "PodMonitor":
            chosen = selected(objects, found["spec"]["selector"]["matchLabels"])
            with_port = {
                pod_of(o)["metadata"]["labels"][found["spec"]["jobLabel"]]  # type: ignore[index]
                for o in chosen
                for c in containers(o)
                for p in c.get("ports", ())
                if p["name"] == found["spec"]["podMetricsEndpoints"][0]["port"]
            }
            assert with_port == {"producer", "trainer", "exporter"}
        elif found["kind"] == "NetworkPolicy":
            assert selected(objects, found["spec"]["podSelector"]["matchLabels"])
            for rule in found["spec"].get("ingress", ()):
                for port in rule["ports"]:
                    chosen = selected(objects, found["spec"]["podSelector"]["matchLabels"])
                    names = {p["name"] for o in chosen for c in containers(o) for p in c.get("ports", ())}
                    assert port["port"] in names


def test_every_pod_is_under_a_policy_that_lets_nobody_in_by_default(objects: list[Object]) -> None:
    for found in objects:
        if pod_of(found) is not None:
            policies = [
                policy
                for policy in of_kind(objects, "NetworkPolicy").values()
                if "Ingress" in policy["spec"]["policyTypes"]
                and found in selected(objects, policy["spec"]["podSelector"]["matchLabels"])
            ]
            assert len(policies) == 1, identity(found)
            for rule in policies[0]["spec"]["ingress"]:
                assert rule["from"]
                assert rule["ports"]


def test_autoscalers_ask_for_metrics_that_exist_and_scale_what_is_there() -> None:
    objects = build(KUBERNETES / "overlays" / "gpu")
    scaled = of_kind(objects, "ScaledObject")
    deployments = of_kind(objects, "Deployment")
    assert set(scaled) == {"producer", "trainer"}
    published = _published_metrics()
    for name, found in scaled.items():
        assert found["spec"]["scaleTargetRef"]["name"] == name
        # two who say how many would quarrel
        assert "replicas" not in deployments[name]["spec"]
        for trigger in found["spec"]["triggers"]:
            (metric,) = re.findall(r"\b(?:penstock|sae)_\w+", trigger["metadata"]["query"])
            if published is not None:
                assert metric in published
            # another installation that the same Prometheus watches has nothing to do with it
            assert f'{metric}{{namespace="{found["metadata"]["namespace"]}"}}' in trigger["metadata"]["query"]
    assert deployments["exporter"]["spec"]["replicas"] == 1


def _published_metrics() -> set[str] | None:
    """Names of all metrics; None as long as there is no exporter."""
    documented = ROOT / "docs" / "observability.md"
    if not documented.exists():
        return None
    own = {family.name for family in metrics.REGISTRY.collect()}
    return own | set(re.findall(r"^\| `(\w+)` \|", documented.read_text(), re.MULTILINE))


# ---- pods


def test_pods_are_restricted(objects: list[Object]) -> None:
    """The Pod Security Standard "restricted", which the namespace enforces, and a read-only root besides."""
    namespace = of_kind(objects, "Namespace")["penstock"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for found in objects:
        pod = pod_of(found)
        if pod is None:
            continue
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in containers(found):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


def test_pods_of_ours_are_what_the_image_is(objects: list[Object]) -> None:
    uid, gid = map(int, effective(STAGES, "cpu", "USER").split(":"))
    declared = set(yaml.safe_load(effective(STAGES, "cpu", "VOLUME")))
    for found, container in ours(objects):
        pod = pod_of(found)
        assert pod is not None
        context = pod["spec"]["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, gid, gid)
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/tmp", environment(STAGES, "cpu")["HOME"], effective(STAGES, "cpu", "WORKDIR")} <= mounted
        assert mounted <= declared | {"/tmp", "/etc/penstock", environment(STAGES, "cpu")["HOME"]}


def test_whoever_lasts_has_probes_and_time_to_stop(objects: list[Object]) -> None:
    for found, container in ours(objects):
        pod = pod_of(found)
        assert pod is not None
        if "ports" not in container:
            assert found["kind"] == "Job"
            continue
        # an exporter is ready once it has seen the store; it is not to be killed for a store that is away
        started = "/livez" if container["args"][0] == "exporter" else "/readyz"
        for probe, path in (
            ("startupProbe", started),
            ("livenessProbe", "/livez"),
            ("readinessProbe", "/readyz"),
        ):
            assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
        if container["args"][0] in ("produce", "train"):
            compose = COMPOSE.services["producer" if container["args"][0] == "produce" else "trainer"]
            assert pod["spec"]["terminationGracePeriodSeconds"] == compose.stop_grace_period


def test_gpus_are_asked_for_where_they_are_used() -> None:
    with_gpu = {
        found["metadata"]["name"]
        for found, container in ours(build(KUBERNETES / "overlays" / "gpu"))
        if container["resources"]["limits"].get("nvidia.com/gpu") == "1"
    }
    assert with_gpu == {"producer", "trainer"}
    for _, container in ours(build(KUBERNETES / "overlays" / "cpu-single-node")):
        assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_without_autoscaling_no_producer_is_started_for_ever() -> None:
    objects = build(KUBERNETES / "overlays" / "cpu-single-node")
    assert set(of_kind(objects, "Deployment")) == {"trainer", "exporter"}
    assert set(of_kind(objects, "Job")) == {"bucket", "corpus", "producer", "submit"}
    for job in of_kind(objects, "Job").values():
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
