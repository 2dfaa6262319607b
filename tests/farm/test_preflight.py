"""`farm preflight` without Ray: each of its checks on something good and on something bad."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.runtime_env.packaging import create_package
from stage_farm import plan_of, write_config
from terminal import Terminal

from farm.cluster import inspect, node, upload
from farm.plan import Plan
from farm.preflight import check_disk, check_store, weights_of
from farm.store import LocalStore

MIB = 2**20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and no Ray named by the environment."""
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys, "preflight")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs/run_farm.py").write_text("print('a farm')\n")
    return folder


def states(document: Any) -> dict[str, str]:
    return {check["what"]: check["state"] for check in document["checks"]}


# The command


def test_a_farm_that_can_run(tmp_path: Path, checkout: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", cluster__cpus=3)
    document = terminal.document("--config", config, "--working-dir", checkout)
    assert document["ok"]
    assert states(document) == dict.fromkeys(
        ["configuration", "photos and models", "store", "disk", "job upload", "token", "cluster"]
        + [f"stage {stage}" for stage in ("edit", "base", "ranks", "adapters")],
        "ok",
    )
    found = {check["what"]: check["found"] for check in document["checks"]}
    assert found["cluster"].startswith("none is named, so a run starts a Ray on this machine: 3 CPUs")
    assert found["stage edit"] == "a worker takes 1 CPU; 3 fit now"
    assert not list(LocalStore(tmp_path / "store").list()), "something was left in the store"
    shown = terminal.good("--config", config, "--working-dir", checkout)
    assert all(check["what"] in shown for check in document["checks"]) and "error" not in shown


def test_every_mistake_is_a_line_of_its_own(tmp_path: Path, terminal: Terminal) -> None:
    (tmp_path / "file").touch()
    config = write_config(
        tmp_path / "farm.yaml",
        tmp_path / "file/store",
        sources__kind="folder",
        sources__path=str(tmp_path / "nowhere"),
        cluster__cpus=3,
        cluster__edit__cpus=10_000,
        base__workers=10_000,
    )
    status, out, err = terminal.farm("--config", config, "--working-dir", tmp_path / "nothing", "--json")
    assert (status, err) == (1, "")
    document = json.loads(out)
    assert not document["ok"]
    wrong = {check["what"]: check["found"] for check in document["checks"] if check["state"] == "error"}
    assert wrong["photos and models"].startswith(f"{config}: sources.path: there is no folder")
    assert "file/store" in wrong["store"]
    assert "no folder" in wrong["job upload"]
    assert wrong["stage edit"].startswith("cluster.edit.cpus: a worker wants 10000 CPUs and the largest node has 3;")
    assert wrong["stage base"].startswith("base.workers: 10000 workers of 1 CPU start together")
    assert states(document)["stage adapters"] == "ok"


def test_a_configuration_that_cannot_be_read(tmp_path: Path, checkout: Path, terminal: Terminal) -> None:
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", stroe="x")
    status, out, _ = terminal.farm("--config", config, "--working-dir", checkout)
    assert status == 1
    assert "did you mean store?" in out and "job upload" in out


def test_a_cluster_that_does_not_answer_is_told_of_at_once(
    tmp_path: Path, checkout: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    config = write_config(tmp_path / "farm.yaml", tmp_path / "store", cluster__address=address)
    status, out, _ = terminal.farm("--config", config, "--working-dir", checkout)
    assert status == 1
    assert f"no Ray cluster answers at {address}" in out
    assert "holds no token" in out


# The store and its disk


@dataclass(frozen=True)
class Overwriting(LocalStore):
    """Such as a file system that cannot link."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


@dataclass(frozen=True)
class Unchecked(LocalStore):
    """Such as a file system that cannot lock."""

    def replace_if_match(self, key: str, data: bytes, etag: str) -> bool:
        self.put(key, data)
        return True


@dataclass(frozen=True)
class Unlinkable(LocalStore):
    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise OSError(95, "Operation not supported")


def test_a_store_that_keeps_its_promises(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert check_store(store).state == "ok"
    assert not list(store.list())


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (Overwriting, "wrote a new object over another"),
        (Unchecked, "replaced an object that had changed"),
        (Unlinkable, "Operation not supported"),
    ],
)
def test_a_store_that_does_not(tmp_path: Path, kind: type[LocalStore], complaint: str) -> None:
    store = kind(tmp_path / "store")
    found = check_store(store)
    assert found.state == "error" and complaint in found.found
    assert not list(store.list())


def test_a_store_that_went_away(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    shutil.rmtree(store.root)
    found = check_store(store)
    assert found.state == "error" and "does not answer" in found.found


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(10**9, "warning"), (10**8, "error"), (10**13, "ok")])
def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, free))
    assert check_disk(LocalStore(tmp_path / "store"), plan_of(tmp_path / "store")).state == state


def test_more_photos_need_more_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, 10**9 * 3))
    few, many = (plan_of(tmp_path / "store", sources__crops_per_photo=n, selection__clusters=9) for n in (6, 1000))
    large = plan_of(tmp_path / "store", sources__crops_per_photo=1000, selection__clusters=None, sources__size=256)
    store = LocalStore(tmp_path / "store")
    assert [check_disk(store, plan).state for plan in (few, many, large)] == ["ok", "ok", "error"]


# What the workers load


def plan_with(tmp_path: Path, **changes: Any) -> Plan:
    return plan_of(tmp_path / "store", **changes)


def test_the_models_that_workers_load(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    model, inception = tmp_path / "teacher.onnx", tmp_path / "inception"
    model.write_bytes(b"network")
    diffusion = {"kind": "stable-diffusion", "revision": commit}
    plan = plan_with(
        tmp_path,
        teachers={
            "network": {"kind": "onnx", "path": str(model)},
            "sd": {**diffusion, "model": "one/model"},
            "fetched": {**diffusion, "model": "another/model", "download": True},
            "filter": {"kind": "procedural", "style": "sepia"},
        },
        catalogue=[
            {"id": "charcoal", "prompt": "x", "teachers": ["network", "sd"]},
            {"id": "cyanotype", "prompt": "x", "teachers": ["sd", "fetched"]},
            {"id": "night", "prompt": "x", "teachers": ["filter"]},
        ],
        evaluation__inception=str(inception),
    )
    assert [(w.key, w.model, w.revision, w.stages) for w in weights_of(plan)] == [
        ("teachers.network.path", str(model), None, ("edit",)),
        ("teachers.sd.model", "one/model", commit, ("edit",)),
        ("evaluation.inception", str(inception), None, ("base", "ranks", "adapters")),
    ]
    assert node.has_model(str(model), None)
    assert not node.has_model(str(inception), None)
    assert not node.has_model("one/model", commit)


# The upload


names = st.text("abc.", min_size=1, max_size=4).filter(lambda name: name.strip("."))
files = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map("/".join), st.integers(min_value=0, max_value=3000), max_size=8
)


@given(files=files, ignored=st.lists(names, max_size=2), rayignored=st.lists(names, max_size=2))
def test_the_upload_is_as_large_as_what_ray_makes(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, int], ignored: list[str], rayignored: list[str]
) -> None:
    base = tmp_path_factory.mktemp("upload")
    folder = base / "folder"
    folder.mkdir()
    (folder / ".gitignore").write_text("\n".join(ignored))
    (folder / ".rayignore").write_text("\n".join(rayignored))
    for name, size in files.items():
        path = folder / name
        if any(parent.is_file() for parent in path.parents) or path.is_dir():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x00" * size)
    (folder / "nothing in it").mkdir()
    create_package(str(folder), base / "package.zip", include_gitignore=True, excludes=[".git", ".venv", "venv"])
    size, entries = upload.upload_size(folder)
    assert size == (base / "package.zip").stat().st_size
    assert sum(count for _, count in entries) <= size
    assert entries == sorted(entries, key=lambda entry: -entry[1])


def test_git_is_counted_where_ray_sends_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / ".git/objects/pack.bin").write_bytes(bytes(3 * MIB))
    without, entries = upload.upload_size(checkout)
    assert without < 10_000 and [name for name, _ in entries] == ["jobs"]
    assert upload.check_upload(checkout).state == "ok"

    monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # as versions of Ray before it did
    size, entries = upload.upload_size(checkout)
    assert size > 3 * MIB and entries[0][0] == ".git"
    found = upload.check_upload(checkout)
    assert found.state == "warning" and ".git" in found.found and "`.git/` in .rayignore" in found.found

    (checkout / ".rayignore").write_text(".git/\n")
    assert ".git" not in dict(upload.upload_size(checkout)[1])


@pytest.mark.parametrize(("mib", "state"), [(40, "ok"), (60, "warning"), (101, "error")])
def test_how_large_an_upload_may_be(checkout: Path, mib: int, state: str) -> None:
    with (checkout / "photos.tar").open("wb") as file:
        file.truncate(mib * MIB)
    found = upload.check_upload(checkout)
    assert found.state == state
    if state != "ok":
        assert "photos.tar" in found.found and ".rayignore" in found.found


def test_this_checkout_is_small() -> None:
    size, entries = upload.upload_size(Path(__file__).parents[2])
    assert size < 5 * MIB
    sent = {name for name, _ in entries}
    assert {"farm", "e2gan", "jobs", "configs"} <= sent
    assert not sent & {".git", ".venv", "tests", "docs", "work"}


# The token


def test_the_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(address: str | None = "auto") -> str:
        return inspect.check_token(address).state

    assert (state(None), state()) == ("ok", "warning"), "Ray makes one for itself, but sends none unless told to"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert (state(None), state()) == ("ok", "error")
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.touch(mode=0o600)
    assert state() == "error", "empty"
    file.write_text("0" * 64)
    assert (state(None), state()) == ("ok", "ok")
    file.chmod(0o644)
    assert state() == "warning"
    assert f"chmod 600 {file}" in inspect.check_token("auto").found
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert state() == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert state() == "warning"


# A node from within


def seen(store: LocalStore | None, probe: str = "probe/one", *models: tuple[str, str, None]) -> bytes:
    return pickle.dumps((store, probe, models))


def test_a_node_like_this_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    store.put("probe/one", b"probe/one")
    assert node.differences(node.facts(), seen(store), gpus=0) == []


def test_a_node_with_other_packages() -> None:
    here = {"Python": "3.11.7", "numpy": "2.4.6", "peft": "0.21.2", "torch": None, "e2gan": "aa", "farm": "bb"}
    assert node.compared(here, {**here, "torch": "2.14.1"}) == []
    (lacks, has, code) = node.compared(here, {**here, "Python": "3.11.9", "numpy": "2.0.0", "peft": None, "farm": "cc"})
    assert lacks == ("error", "lacks peft: install from constraints.txt.")
    assert has[0] == "warning" and has[1].startswith("has Python 3.11.9 (3.11.7 here), numpy 2.0.0 (2.4.6 here):")
    assert code[0] == "warning" and code[1].startswith("has other code of farm:")
    [(state, none)] = node.compared(here, {**here, "e2gan": None, "farm": None})
    assert state == "warning" and none.startswith("has no farm, so its store and models were not looked at:")


def test_a_node_with_other_gpus_than_ray_counts() -> None:
    [(state, problem)] = node.gpus_seen(64)
    assert state == "error" and problem.startswith("Ray counts 64 GPUs and torch sees ")


def test_a_node_without_the_store(tmp_path: Path) -> None:
    mounted, away = LocalStore(tmp_path / "other"), LocalStore(tmp_path / "away")
    shutil.rmtree(away.root)
    [(state, problem)] = node.data_seen(seen(mounted))
    assert state == "error" and "another folder" in problem
    [(state, problem)] = node.data_seen(seen(away))
    assert state == "error" and "cannot read the store" in problem
    assert not away.root.exists(), "a look must not make the folder that should be mounted"


def test_a_node_without_the_models(tmp_path: Path) -> None:
    lacking = ("text.path", str(tmp_path / "clip"), None)
    [(state, problem)] = node.data_seen(seen(None, "probe/one", lacking, ("selection.path", __file__, None)))
    assert state == "error" and f"does not have {tmp_path / 'clip'} (text.path)" in problem


@given(st.floats(-100, 100), st.floats(0, 20), st.floats(0, 20))
def test_a_clock_that_is_off(skew: float, there: float, back: float) -> None:
    found = node.clock_off(1e9, 1e9 + there + skew, 1e9 + there + back)
    if abs(skew) < node.CLOCK_SECONDS - 1e-3:
        assert found == [], "the time that the way takes was taken for a difference"
    if abs(skew) > node.CLOCK_SECONDS + there + back + 1e-3:
        [(state, problem)] = found
        assert state == "warning" and ("ahead" if skew > 0 else "behind") in problem
