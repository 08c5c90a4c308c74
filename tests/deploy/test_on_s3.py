"""The whole experiment on a real S3 server and an external Redis: everything is as it is on local files."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.store.objects import open_store
from services.ceph import CephGateway
from services.command import penstock, small_config, write_config
from services.trees import tree_digests
from services.valkey import debian_redis

pytestmark = pytest.mark.services


@dataclass(frozen=True)
class OnS3:
    """A finished experiment: its config file, its work directory, how to reach its server, its URLs."""

    config: Path
    workdir: Path
    environment: dict[str, str]
    base: str

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.workdir / "summary.json").read_text())
        return found

    @property
    def run_url(self) -> str:
        return f"{self.base}/runs/{self.summary['run']}"

    def call(self, *arguments: str | Path) -> str:
        done = penstock(*arguments, env=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def on_s3(ceph: CephGateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnS3]:
    workdir = tmp_path_factory.mktemp("s3") / "work"
    base = f"s3://{ceph.make_bucket()}/experiment"
    with debian_redis() as redis_url:
        config = small_config(workdir, producers=2, dataset__url=f"{base}/dataset", runs_url=f"{base}/runs")
        config["corpus"]["url"] = f"{base}/corpus"
        config["redis"]["url"] = redis_url
        file = write_config(workdir.parent / "config.yaml", config)
        experiment = OnS3(file, workdir, ceph.environment(), base)
        output = experiment.call("run", file)
        assert ": done, " in output
        yield experiment


def test_every_byte_and_every_weight_is_that_of_local_files(
    on_s3: OnS3, small_run: Path, clean_aws: pytest.MonkeyPatch
) -> None:
    for name, value in on_s3.environment.items():
        clean_aws.setenv(name, value)
    for what in ("corpus", "dataset"):
        store = open_store(f"{on_s3.base}/{what}")
        stored = {key: hashlib.sha256(store.get(key)).hexdigest() for key, _ in store.list("")}
        whose = ("provenance", "readers")
        stored = {key: digest for key, digest in stored.items() if key.split("/")[0] not in whose}
        assert stored == tree_digests(small_run / what, leave_out=whose)
    local = json.loads((small_run / "summary.json").read_text())
    assert weights(on_s3.summary) == weights(local)
    assert on_s3.summary["training"]["rows"] == local["training"]["rows"]
    # nothing but logs, reports and the config on the local disk
    left = {path.name for path in on_s3.workdir.iterdir()}
    assert not left & {"corpus", "dataset", "runs", "valkey"}


def weights(summary: dict[str, Any]) -> dict[str, str]:
    return {sae["name"]: sae["weights_sha256"] for sae in summary["saes"]}


def test_the_other_commands_work_on_its_urls(on_s3: OnS3, tmp_path: Path) -> None:
    for url in (f"{on_s3.base}/corpus", f"{on_s3.base}/dataset", on_s3.run_url):
        assert f"{url}: no faults" in on_s3.call("verify", url)
        assert url in on_s3.call("inspect", url)
    status = on_s3.call("status", on_s3.config)
    assert ": done, position 16 of 16" in status
    assert "redis: up" in status
    on_s3.call("report", on_s3.config, on_s3.run_url, "--out", tmp_path)
    again = json.loads((tmp_path / "summary.json").read_text())
    assert weights(again) == weights(on_s3.summary)
    assert "<html" in (tmp_path / "report.html").read_text()
    assert "everything is done already" in on_s3.call("run", on_s3.config)
