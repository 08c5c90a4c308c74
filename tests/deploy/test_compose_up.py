"""compose.yaml comes up: every Penstock service as it is written there, beside a real Valkey and S3 server.

No engine is needed: containers are made of namespaces (services/containers.py). What differs from Docker: the
image's programs are this interpreter's, and the S3 server is moto in place of SeaweedFS
(test_compose_watched.py has Ceph).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.store.heads import newest_head
from penstock.store.objects import open_store
from services.command import small_config, write_config
from services.containers import need_containers
from services.deployment import SECRETS, Up, bring_up
from services.moto import MotoServer

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def up(moto: MotoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    need_containers()
    config = small_config(Path("/var/lib/penstock"), runs_url="s3://penstock/runs", json_logs=True)
    config["corpus"]["url"] = "s3://penstock/corpus"
    config["dataset"]["url"] = "s3://penstock/dataset"
    config["metrics"] = {"host": "0.0.0.0", "port": 9464}
    file = write_config(tmp_path_factory.mktemp("compose") / "penstock.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto.environment().items():
            patch.setenv(name, value)
        with bring_up(moto, file, "cpu") as running:
            yield running


def test_a_run_is_trained_to_the_end(up: Up, small_run: Path) -> None:
    stack = up.stack
    lasting = [name for name in ("trainer", "exporter") if name in stack.services]
    up.until("bucket and corpus", lambda: stack.completed("corpus"))
    up.until("producer", lambda: stack.healthy("producer"))
    up.until("trainer", lambda: all(stack.healthy(name) for name in lasting))
    up.until("submit", lambda: stack.completed("submit"))
    up.until("the run", lambda: (head := up.head()) is not None and head.status == "done")
    up.until("the producer's end", lambda: stack.completed("producer"))
    assert stack.ends["producer"] == [0]
    assert stack.ends["bucket"] == [0]
    assert [stack.ends[name] for name in lasting] == [[] for _ in lasting]
    # the very bits of the same experiment under `penstock run` on files
    (local,) = (path for path in (small_run / "runs").iterdir() if path.is_dir())
    there, here = up.head(), newest_head(open_store(str(small_run / "runs")), local.name)
    assert there is not None
    assert here is not None
    assert {k: f.sha256 for k, f in there.checkpoint.items()} == {
        k: f.sha256 for k, f in here.checkpoint.items()
    }
    assert there.rows == here.rows


def test_nothing_is_written_but_to_volumes(up: Up) -> None:
    for name, service in up.stack.services.items():
        if service.is_penstock:
            container = up.stack.container(name)
            extra = {p for p in container.written() if not p.startswith(("opt/penstock/bin/", "etc/"))}
            assert extra == set(), name


def test_containers_are_what_they_say(up: Up) -> None:
    trainer = up.stack.container("trainer")
    assert trainer.call("id", "-u").stdout.strip() == "10001"
    assert trainer.call("touch", "/usr/here").returncode != 0
    assert trainer.call("touch", "/etc/penstock/penstock.yaml").returncode != 0
    assert trainer.call("touch", "/tmp/here", "/home/penstock/here", "/var/lib/penstock/here").returncode == 0
    assert "CapBnd:\t0000000000000000" in trainer.call("cat", "/proc/self/status").stdout


def test_what_the_guide_asks_for_inside_works(up: Up) -> None:
    """docs/operations.md: the status of everything, and a run's report."""
    trainer, config = up.stack.container("trainer"), "/etc/penstock/penstock.yaml"
    status = trainer.call("penstock", "status", config)
    assert "position 16 of 16" in status.stdout, status.stderr
    (run_id,) = open_store("s3://penstock/runs").folders("")
    out = "/var/lib/penstock/report"
    report = trainer.call(
        *("penstock", "report", config, f"s3://penstock/runs/{run_id}", "--out", out), timeout=300
    )
    assert report.returncode == 0, report.stderr
    written = {path.name for path in (up.stack.volume("state") / "report").iterdir()}
    assert {"report.html", "summary.json"} <= written


def test_no_secret_is_in_a_log(up: Up) -> None:
    logs = up.stack.logs()
    assert {"bucket", "corpus", "producer", "submit", "trainer", "valkey"} <= set(logs)
    for name, text in logs.items():
        for secret in (*SECRETS.values(), up.server.secret_key):
            assert secret not in text, name


def test_down_is_quick_and_up_again_finds_everything(up: Up) -> None:
    stack = up.stack
    before = up.head()
    assert before is not None
    print(f"seconds from SIGTERM to the end: {stack.down()}")
    assert (stack.volume("valkey") / "appendonlydir").is_dir()
    up.until("submit again", lambda: stack.completed("submit"))
    up.until("the producer's end again", lambda: stack.completed("producer"))
    up.until("trainer again", lambda: stack.healthy("trainer"))
    assert "was submitted before" in stack.logs()["submit"]
    assert "was there before" in stack.logs()["bucket"]
    assert up.head() == before
