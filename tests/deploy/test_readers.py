"""Someone who may only read can open, iterate, inspect and verify a dataset; nothing is written or probed."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.store.dataset import Dataset, open_dataset
from penstock.store.objects import open_store
from services.ceph import CephGateway
from services.processes import need
from services.synthetic import SyntheticSource, write_dataset
from services.trees import tree_digests

READ_ONLY = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--"]
"""For root, whom permissions bind only without these."""


def digest_of(dataset: Dataset) -> str:
    """Of every row; each is one that was made."""
    digest = hashlib.sha256()
    source = SyntheticSource(dataset.manifest)
    for index in range(dataset.n_chunks):
        stored, made = dataset.read_chunk(index), source.chunk(index)
        for hook in dataset.manifest.hooks:
            rows, wanted = stored.acts[hook.name].view(np.uint16), made.acts[hook.name].view(np.uint16)
            assert sorted(rows.tolist()) == sorted(wanted.tolist())
            digest.update(rows.tobytes())
    return digest.hexdigest()


def read(url: str, environment: dict[str, str], prefix: list[str]) -> list[str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(tests), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "services.reading", url],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment | {"PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A dataset below which nothing may be written, as long as permissions bind."""
    directory = tmp_path / "dataset"
    write_dataset(directory, indexed=True)
    everything = [directory, *directory.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield directory
    for path in everything:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_on_files(closed: Path) -> None:
    prefix = []
    if os.access(closed, os.W_OK):
        need("setpriv")
        prefix = READ_ONLY
    before = tree_digests(closed)
    said = read(str(closed), {}, prefix)
    assert said[0].startswith("put: ")
    assert "Permission denied" in said[0]
    assert f"dataset {closed}: no faults" in said
    assert said[-1] == digest_of(open_dataset(str(closed)))
    assert tree_digests(closed) == before


@pytest.mark.services
def test_on_ceph(ceph: CephGateway, clean_aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in ceph.environment().items():
        clean_aws.setenv(name, value)
    bucket = ceph.make_bucket()
    url = f"s3://{bucket}/some/dataset"
    local, remote = open_store(str(tmp_path)), open_store(url)
    write_dataset(tmp_path, indexed=True)
    for key, _ in local.list(""):
        remote.create(key, local.get(key))
    before = ceph.keys(bucket)
    said = read(url, ceph.make_reader(bucket), [])
    assert said[0].startswith(f"put: {url}/written: access denied")
    assert f"dataset {url}: no faults" in said
    assert said[-1] == digest_of(open_dataset(url))
    assert ceph.keys(bucket) == before
