"""`kustomize build` for what our kustomizations use; everything else is refused.

Kustomize is no Python package, so its part that we need is here: resources, components, generated ConfigMaps,
JSON patches, deletions, images, a namespace.
"""

import copy
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from services.compose import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-single-node", "gpu")

Object = dict[str, Any]

_CLUSTER_WIDE = {"Namespace"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Target(_Strict):
    kind: str
    name: str


class _Patch(_Strict):
    patch: str
    target: _Target | None = None


class _Generator(_Strict):
    name: str
    files: list[str] = []
    literals: list[str] = []


class _GeneratorOptions(_Strict):
    disableNameSuffixHash: bool = False  # noqa: N815


class _Image(_Strict):
    name: str
    newTag: str  # noqa: N815


class _Kustomization(_Strict):
    apiVersion: str  # noqa: N815
    kind: str
    namespace: str | None = None
    resources: list[str] = []
    components: list[str] = []
    generatorOptions: _GeneratorOptions = _GeneratorOptions()  # noqa: N815
    configMapGenerator: list[_Generator] = []  # noqa: N815
    images: list[_Image] = []
    patches: list[_Patch] = []


class _UniqueKeys(yaml.SafeLoader):
    """A mapping with a key twice is an error, as it is for Kubernetes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


def load_all(path: Path) -> list[Object]:
    """Every document of a YAML file."""
    return list(yaml.load_all(path.read_text(), _UniqueKeys))


def build(directory: Path) -> list[Object]:
    """Everything that `kubectl apply --kustomize` would send."""
    (data,) = load_all(directory / "kustomization.yaml")
    wanted = _Kustomization.model_validate(data)
    assert wanted.kind == "Kustomization"
    objects = _resources(directory, wanted)
    for name in wanted.components:
        (found,) = load_all(directory / name / "kustomization.yaml")
        component = _Kustomization.model_validate(found)
        assert component.kind == "Component"
        assert component.model_fields_set == {"apiVersion", "kind", "resources"}
        objects += _resources(directory / name, component)
    if wanted.configMapGenerator:
        assert wanted.generatorOptions.disableNameSuffixHash
    objects += [_config_map(directory, generator) for generator in wanted.configMapGenerator]
    for patch in wanted.patches:
        objects = _patched(objects, patch)
    for image in wanted.images:
        used = [c for o in objects for c in containers(o) if c["image"] == image.name]
        assert used, f"no container has the image {image.name}"
        for container in used:
            container["image"] = f"{image.name}:{image.newTag}"
    if wanted.namespace is not None:
        for found in objects:
            if found["kind"] not in _CLUSTER_WIDE:
                found["metadata"]["namespace"] = wanted.namespace
    names = [identity(found) for found in objects]
    assert len(names) == len(set(names)), f"twice: {sorted(n for n in names if names.count(n) > 1)}"
    return objects


def identity(found: Object) -> tuple[str, str]:
    """Kind and name."""
    return found["kind"], found["metadata"]["name"]


def pod_of(found: Object) -> Object | None:
    """The pod template of a workload, None for other objects."""
    if found["kind"] in ("Deployment", "StatefulSet", "Job"):
        template: Object = found["spec"]["template"]
        return template
    return None


def containers(found: Object) -> list[Object]:
    """All containers of a workload."""
    pod = pod_of(found)
    if pod is None:
        return []
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def _resources(directory: Path, wanted: _Kustomization) -> list[Object]:
    found: list[Object] = []
    for name in wanted.resources:
        path = directory / name
        found += build(path) if path.is_dir() else load_all(path)
    return found


def _config_map(directory: Path, generator: _Generator) -> Object:
    # kustomize reads no file outside of the kustomization's own directory
    assert all("/" not in name for name in generator.files)
    data = {name: (directory / name).read_text() for name in generator.files}
    data |= dict(literal.split("=", 1) for literal in generator.literals)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator.name}, "data": data}


def _patched(objects: list[Object], patch: _Patch) -> list[Object]:
    content = yaml.load(patch.patch, _UniqueKeys)
    if patch.target is None:
        assert content.pop("$patch") == "delete"
        assert set(content) == {"apiVersion", "kind", "metadata"}
        left = [found for found in objects if identity(found) != identity(content)]
        assert len(left) == len(objects) - 1, f"nothing to delete: {identity(content)}"
        return left
    name = re.compile(f"^(?:{patch.target.name})$")
    targets = [o for o in objects if o["kind"] == patch.target.kind and name.match(o["metadata"]["name"])]
    assert targets, f"nothing to patch: {patch.target}"
    for target in targets:
        for step in content:
            _apply(target, copy.deepcopy(step))
    return objects


def _apply(target: Any, step: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *parents, last = (
        part.replace("~1", "/").replace("~0", "~") for part in step["path"].removeprefix("/").split("/")
    )
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    assert isinstance(target, dict), step
    if step["op"] in ("replace", "remove"):
        assert last in target, step
    if step["op"] == "remove":
        assert set(step) == {"op", "path"}
        del target[last]
    else:
        assert step["op"] in ("add", "replace")
        target[last] = step["value"]
