"""A real server of S3 on this machine: Ceph's gateway over one monitor and one disk that is a sparse file.

`python tests/integration/rgw.py FOLDER` runs one until it is interrupted, and prints its endpoint and keys. It needs
Debian's `ceph-mon ceph-osd radosgw`, 230 MB of memory and about 20 s; everything lies in the folder, which must be new.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ports import free_port

PROGRAMS = ("setpriv", "ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
ACCESS_KEY, SECRET_KEY = "FARMTESTSACCESSKEY00", "farm-tests-secret-key-of-nobody"
START_SECONDS = 120

SETTINGS = """
[global]
fsid = {fsid}
mon initial members = a
mon host = [v1:127.0.0.1:{port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {folder}/mon
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block create = true
osd memory target = 939524096
run dir = {folder}
admin socket =
log file = {folder}/$name.log
pid file = {folder}/$name.pid
keyring = {folder}/keyring
rgw max listing results = {page}
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@dataclass
class Ceph:
    """A monitor, a disk and a user, for any number of gateways."""

    folder: Path
    page: int = 100  # keys of a listing; short pages make tests of many quick
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def settings(self) -> Path:
        return self.folder / "ceph.conf"

    def run(self, *command: str) -> str:
        """A program's answer; CalledProcessError, with what it said, when it fails."""
        program, *arguments = command
        known = [] if program == "monmaptool" else ["--conf", str(self.settings)]
        done = subprocess.run([program, *known, *arguments], capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            dies_with_us = ["setpriv", "--pdeathsig", "KILL"]  # with the thread that starts it
            started = subprocess.Popen(
                [*dies_with_us, command[0], "--conf", str(self.settings), "--foreground", *command[1:]],
                stdout=log,
                stderr=log,
            )
        self.daemons.append(started)
        return started

    def start(self) -> None:
        fsid = str(uuid.uuid4())
        port = free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings.write_text(SETTINGS.format(fsid=fsid, port=port, folder=self.folder, page=self.page))
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        monmap = str(self.folder / "monmap")
        self.run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, monmap)
        self.run("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap)
        self.daemon("ceph-mon", "--id", "a")
        osd = str(uuid.uuid4())
        self.run("ceph", "osd", "new", osd)
        self.run("ceph-osd", "--id", "0", "--mkfs", "--osd-uuid", osd)
        self.run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=local")
        self.daemon("ceph-osd", "--id", "0")
        user = ["--uid", "farm", "--display-name", "farm", "--access-key", ACCESS_KEY, "--secret", SECRET_KEY]
        self.run("radosgw-admin", "user", "create", *user)

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def ceph(folder: Path, page: int = Ceph.page) -> Iterator[Ceph]:
    cluster = Ceph(folder, page)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Gateway:
    """One radosgw, which can be killed and started again at the same endpoint."""

    cluster: Ceph
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Gateway:
        frontend = f"beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1"  # else every small answer waits for 40 ms
        self.process = self.cluster.daemon("radosgw", "--id", f"gateway-{self.port}", f"--rgw_frontends={frontend}")
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.endpoint, timeout=10):
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"radosgw does not answer: see {self.cluster.folder}")
            time.sleep(0.1)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    with ceph(Path(sys.argv[1]).absolute()) as cluster:
        started = Gateway(cluster).start()
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        print(json.dumps({"endpoint": started.endpoint, **keys}), flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
