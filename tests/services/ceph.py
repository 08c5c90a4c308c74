"""A real S3 server for tests: Ceph's object gateway over one monitor and one disk server, from Debian.

Everything lives in one temporary directory and listens on free ports of 127.0.0.1, so several can run.

    PYTHONPATH=tests python -m services.ceph [BUCKET]

starts one for people, makes a bucket, prints what to export and waits for Ctrl-C; then everything is gone.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from services.processes import free_port, kill, need, start
from services.s3_server import S3Server
from services.waiting import eventually

_CONFIG = """\
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# one disk, nothing kept twice
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
# the monitor gathers changes this long before it decides: with the default of 1 s a start takes 8 s more
paxos propose interval = 0.05
osd objectstore = bluestore
# a sparse file
bluestore block size = 21474836480
bluestore cache autotune = false
osd memory target = 939524096
osd class update on start = false
# a new bucket is announced to a killed gateway, too, until it has been silent for this long
osd client watch timeout = 3
run dir = {directory}
log file = {directory}/$name.log
admin socket = {directory}/$name.asok
mon data = {directory}/mon
# the monitor ends when less than this share of the disk is free, which a busy machine may well have
mon data avail crit = 0
osd data = {directory}/osd
keyring = {directory}/keyring
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw run sync thread = false
# small pages, so that listings of several are cheap to have
rgw max listing results = 50
# the default, "secure", is not to be had without authentication: the gateway would hang
ms mon client mode = crc
"""

_BINARIES = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_ENDS = {signal.SIGINT, signal.SIGTERM}

_START = 120.0  # seconds; usually 10


class CephGateway(S3Server):
    """An S3 endpoint at `url` for as long as the `with` block lasts.

    Skips (fails on CI) where Ceph is not installed. Objects outlive `kill_gateway` and `kill_all`.
    """

    def __init__(self) -> None:
        need(*_BINARIES)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._stack = ExitStack()
        self._monitor: subprocess.Popen[bytes] | None = None
        self._disk: subprocess.Popen[bytes] | None = None
        self._gateway: subprocess.Popen[bytes] | None = None
        self._port = port

    def __enter__(self) -> "CephGateway":
        with ExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-")))
            stack.callback(self.kill_all)
            self._set_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def gateway_pid(self) -> int:
        assert self._gateway is not None
        return self._gateway.pid

    def make_reader(self, bucket: str) -> dict[str, str]:
        """A new user who may list a bucket and get its objects and nothing else; how to be that user."""
        name = f"reader-{uuid.uuid4().hex[:8]}"
        self._add_user(name, name, self.secret_key)
        allowed = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
            "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [allowed]}
        self._request("PUT", f"{bucket}?policy", json.dumps(policy).encode())
        return self.environment(access_key=name)

    def kill_gateway(self) -> None:
        """SIGKILL the gateway: whatever it was doing is cut off."""
        kill(self._gateway)

    def stop_gateway(self) -> None:
        """Ask the gateway to end, and wait until it has."""
        assert self._gateway is not None
        self._gateway.terminate()
        self._gateway.wait(timeout=_START)

    def start_gateway(self) -> None:
        """Start the gateway on its port and wait until it answers."""
        self._gateway = self._start("radosgw", "-n", "client.rgw.a")
        self._wait_for_gateway()

    def kill_all(self) -> None:
        """SIGKILL every process, as a power cut would."""
        for process in (self._gateway, self._disk, self._monitor):
            kill(process)

    def start_all(self) -> None:
        """Start everything after `kill_all` and wait until the gateway answers."""
        self._monitor = self._start("ceph-mon", "-i", "a")
        self._disk = self._start("ceph-osd", "-i", "0")
        self.start_gateway()

    def _set_up(self) -> None:
        fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
        monitor = f"[v2:127.0.0.1:{free_port()},v1:127.0.0.1:{free_port()}]"
        config = _CONFIG.format(fsid=fsid, monitor=monitor, directory=self._directory, port=self._port)
        (self._directory / "ceph.conf").write_text(config)
        for name in ("mon", "osd"):
            (self._directory / name).mkdir()
        map_, keys = str(self._directory / "monmap"), str(self._directory / "keyring")
        self._call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, map_)
        self._call(
            *("ceph-authtool", "--create-keyring", keys, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        )
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_, "--keyring", keys)
        self._monitor = self._start("ceph-mon", "-i", "a")
        self._call("ceph", "osd", "new", disk)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._call("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h")
        self._disk = self._start("ceph-osd", "-i", "0")
        self.start_gateway()
        self._add_user("test", self.access_key, self.secret_key)

    def _add_user(self, name: str, access_key: str, secret_key: str) -> None:
        self._call(
            *("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}"),
            *(f"--access-key={access_key}", f"--secret-key={secret_key}"),
        )

    def _command(self, name: str, *arguments: str) -> list[str]:
        return [name, "-c", str(self._directory / "ceph.conf"), *arguments]

    def _start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self._directory / f"{name}.out").open("ab") as output:
            return start([*self._command(name, *arguments), "-f"], output)

    def _call(self, name: str, *arguments: str) -> None:
        try:
            done = subprocess.run(
                self._command(name, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_START,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # whoever is asked may have ended
            self._check_alive()
            raise
        assert done.returncode == 0, f"{name} {' '.join(arguments)}: {done.stdout}"

    def _wait_for_gateway(self) -> None:
        def ready() -> bool:
            self._check_alive()
            return _answers(self.url)

        eventually(ready, _START)

    def _check_alive(self) -> None:
        processes = {"ceph-mon": self._monitor, "ceph-osd": self._disk, "radosgw": self._gateway}
        for name, process in processes.items():
            if process is not None and process.poll() is not None:
                said = (self._directory / f"{name}.out").read_text(errors="replace")
                raise AssertionError(f"{name} ended with {process.returncode}: {said[-2000:]}")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return refusal.code < 500
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server for as long as this runs; it keeps nothing.")
    parser.add_argument("bucket", nargs="?", default="penstock")
    bucket = parser.parse_args().bucket
    if missing := [name for name in _BINARIES if shutil.which(name) is None]:
        sys.exit(f"no {', '.join(missing)}: tests/services/install brings it")
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    with CephGateway() as server:
        server.make_bucket(bucket)
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        print(f"# s3://{bucket} is there until Ctrl-C", flush=True)
        signal.sigwait(_ENDS)


if __name__ == "__main__":
    main()
