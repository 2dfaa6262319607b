"""Signatures from the command line: a farm is given a key, is served, is tampered with."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from stage_farm import Cluster, contents, copied, plan_of, write_config
from tampered import edit_json, edit_manifest, replace_file
from terminal import Terminal

from farm.errors import UserError
from farm.registry import Registry
from farm.serve.app import Settings
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published, UnknownConceptError
from farm.signing import new_key, open_keys, public_text
from farm.store import LocalStore

CONCEPT = "sepia"


@pytest.fixture
def store(root: Path, tmp_path: Path) -> LocalStore:
    return copied(root, tmp_path / "store")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    Cluster().stand_in(monkeypatch)
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


@pytest.fixture
def config(store: LocalStore, terminal: Terminal, key: Path, tmp_path: Path) -> Path:
    """The farm's, with its key."""
    signing = {"private_key": str(key), "public_keys": [terminal.good("keys", "show", key).strip()]}
    return write_config(tmp_path / "farm.yaml", store.root, signing=signing)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    PIL.Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_keys_new_says_what_to_write(terminal: Terminal, store: LocalStore, tmp_path: Path) -> None:
    path = tmp_path / "new.pem"
    out = terminal.good("keys", "new", path)
    public = terminal.good("keys", "show", path).strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    published = next(line for line in out.splitlines() if "private_key" in line)
    served = next(line for line in out.splitlines() if "public_keys" in line and "private_key" not in line)
    assert public in published and public in served
    config = tmp_path / "pasted.yaml"
    for line in (published, served):
        config.write_text(f"{write_config(config, store.root).read_text()}{line.strip()}\n")
        assert "is not signed" in terminal.mistake("history", "-c", config, CONCEPT)
    assert terminal.mistake("keys", "new", path).endswith("no key is ever overwritten; choose another name.")
    assert terminal.mistake("keys", "show", tmp_path / "none").startswith("farm keys show: ")
    assert "BEGIN" not in out and path.read_text().splitlines()[1] not in out


def test_a_farm_is_given_a_key_and_served(
    terminal: Terminal, store: LocalStore, config: Path, photo: Path, tmp_path: Path
) -> None:
    edited = tmp_path / "edited.png"
    edit = ("edit", "-c", config, photo, edited, "--concept", CONCEPT)
    export = ("export", "-c", config, "--concepts", CONCEPT)
    for command in (edit, export, ("publish", "-c", config, CONCEPT), ("history", "-c", config, CONCEPT)):
        status, out, err = terminal.farm(*command)
        assert status and f"registry/{CONCEPT}.json is not signed by any of signing.public_keys" in out + err
    status, out, _ = terminal.farm("verify", "-c", config)
    assert status == 1 and out.count("is not signed") == 4
    lines = terminal.good("keys", "sign", "-c", config).splitlines()
    assert lines == [f"{concept}: signed" for concept in ("charcoal", "cyanotype", "night", "sepia")]
    assert terminal.good("keys", "sign", "-c", config).splitlines()[3] == "sepia: signed with this key already"
    assert terminal.farm("verify", "-c", config)[0] == 0
    terminal.good(*edit)
    assert edited.exists()
    terminal.good("unpublish", "-c", config, CONCEPT)
    terminal.good("publish", "-c", config, CONCEPT)
    assert terminal.farm("verify", "-c", config)[0] == 0
    assert terminal.farm("run", "-c", config)[0] == 0
    edited.unlink()
    # Somebody who may write changes what is served.
    entry = Registry(store).get(CONCEPT)
    assert entry is not None
    sound, others = contents(store.root), plan_of(store.root).adapter("night").path
    public = terminal.good("keys", "show", tmp_path / "key.pem").strip()
    tamperings = {
        f"{entry.adapter}/manifest.json was changed": lambda: replace_file(
            store, entry.adapter, "text.safetensors", store.get(f"{others}/text.safetensors")
        ),
        f"bases/{entry.base}/manifest.json was changed": lambda: edit_manifest(
            store, f"bases/{entry.base}", lambda manifest: manifest | {"wall_seconds": 1.5}
        ),
        f"registry/{CONCEPT}.json was changed": lambda: edit_json(
            store, f"registry/{CONCEPT}.json", lambda record: record | {"metrics": {}}
        ),
    }
    for says, tamper in tamperings.items():
        tamper()
        before = contents(store.root)
        assert says in terminal.mistake(*edit) and not edited.exists()
        status, out, _ = terminal.farm("verify", "-c", config)
        assert status == 1 and says in out
        if not says.startswith("bases/"):  # the base does not go along
            assert says in terminal.mistake("push-hub", "-c", config, CONCEPT, "--repo", "you/x")
        there = tmp_path / f"there{len(says)}"
        status, out, _ = terminal.farm("sync", store.root, there, "--public-key", public)
        assert status == 1 and says in out and Registry(LocalStore(there)).record(CONCEPT) is None
        assert contents(store.root) == before
        for name, data in sound.items():
            store.put(name, data)
    terminal.good(*edit)


def test_a_server_serves_what_is_signed(
    store: LocalStore, config: Path, terminal: Terminal, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.of({"config": str(config)})
    assert settings.public_keys == (terminal.good("keys", "show", config.with_name("key.pem")).strip(),)
    published = Published(store, open_keys(None, settings.public_keys))
    bank = Bank(published, Merging, byte_budget=10**9)
    assert "is not signed" in caplog.text
    with pytest.raises(UnknownConceptError):
        bank.get(CONCEPT)
    terminal.good("keys", "sign", "-c", config)
    published.refresh()
    assert bank.get(CONCEPT).version == 1
    with pytest.raises(UserError, match=r"^signing\.public_keys\.0: "):
        Settings.of({"store": str(store.root), "public_keys": ["none"]})
    assert Settings.of({"store": str(store.root)}).public_keys == ()


def test_a_run_without_the_key_stops_before_it_begins(terminal: Terminal, store: LocalStore, config: Path) -> None:
    terminal.good("keys", "sign", "-c", config)
    plan = plan_of(store.root)
    for name in [*store.list(f"{plan.adapter(CONCEPT).path}/")]:
        store.delete(name)
    before = contents(store.root)
    told = terminal.mistake("run", "-c", config, "--set", "signing.private_key=null")
    assert told.startswith(f"{config}: signing.private_key: is missing") and contents(store.root) == before
    assert terminal.farm("run", "-c", config)[0] == 0 and store.exists(f"{plan.adapter(CONCEPT).path}/manifest.json")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("signing.public_keys=[]", "signing: public_keys is needed with private_key"),
        ("signing.public_key=x", "unknown key signing.public_key; did you mean public_keys?"),
        ("signing.private_key=/nowhere", "signing.private_key: /nowhere cannot be read (No such file or directory)"),
        ("signing.public_keys=[/nowhere]", "signing.public_keys.0: /nowhere cannot be read"),
        (f"signing.public_keys=[{public_text(bytes(32))}]", "signing.public_keys: holds no key of "),
    ],
)
def test_mistakes_name_the_file_and_the_key(terminal: Terminal, config: Path, override: str, says: str) -> None:
    assert terminal.mistake("history", "-c", config, "--set", override, CONCEPT).startswith(f"{config}: {says}")


def test_keys_sign_needs_a_key(terminal: Terminal, config: Path, store: LocalStore) -> None:
    bare = write_config(config.with_name("bare.yaml"), store.root)
    assert terminal.mistake("keys", "sign", "-c", bare).startswith(f"{bare}: signing: is missing")
    edit_json(store, "registry/night.json", lambda record: record | {"signature": "AAAA"})
    status, out, _ = terminal.farm("keys", "sign", "-c", config)
    assert status == 1 and out.count(": signed\n") == 3
    assert "registry/night.json was changed after it was signed" in out
