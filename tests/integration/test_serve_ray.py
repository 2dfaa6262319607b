"""The service on a real Ray Serve, over a real socket."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import httpx
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from ports import free_port

from e2gan.config import GeneratorConfig
from e2gan.lora import crucial_layers, new_adapter
from e2gan.lora_peft import save
from e2gan.model import build_generator
from farm.artifacts import Spec, commit
from farm.errors import UserError
from farm.images import decode, encode
from farm.registry import Registry
from farm.serve.access import new_key
from farm.serve.app import running
from farm.serve.bank import Bank
from farm.serve.engines import Merging
from farm.serve.published import Published
from farm.serve.settings import Settings
from farm.store import LocalStore

pytestmark = [
    pytest.mark.ray,
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # importing ray.serve 2.60
]

CONFIG = GeneratorConfig(channels=8)
PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
BODY = encode(PHOTO, "png")
KEY = new_key()


def publish(store, concept, *, seed):
    """Publish a random adapter of a random base."""
    generator = build_generator(CONFIG, seed=0)
    base = commit(
        store,
        Spec(stage="pretrain", version=1, folder="bases"),
        {
            "config.json": json.dumps(asdict(CONFIG)).encode(),
            "generator.safetensors": safetensors.torch.save(generator.state_dict()),
        },
        wall_seconds=0,
    )
    random = torch.Generator().manual_seed(seed)
    adapter = new_adapter(generator, dict.fromkeys(crucial_layers(generator), 2), seed=seed)
    for name, tensor in adapter.tensors.items():
        if name.endswith(".lora_B"):
            tensor.normal_(0, 0.5, generator=random)
    files = save(adapter, base=base.digest)
    files["text.safetensors"] = safetensors.torch.save({"text": torch.randn(77, 768, generator=random)})
    made = commit(store, Spec(stage="adapt", version=1, folder=f"adapters/{concept}", seed=seed), files, wall_seconds=0)
    return Registry(store).publish(concept, adapter=made.path, digest=made.digest, base=base.digest, metrics={})


def expected(store, concept):
    return Bank(Published(store), Merging, byte_budget=1).get(concept).edit(PHOTO)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def pixels(response):
    assert response.status_code == 200, response.text
    return np.asarray(decode(response.content, what="the answer"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = LocalStore(tmp_path_factory.mktemp("serve") / "store")
    publish(store, "fog", seed=1)
    publish(store, "ink", seed=2)
    return store


@pytest.fixture(scope="module")
def client(store):
    port = free_port()
    keys = [{"name": "root", "sha256": KEY[1], "admin": True}]
    limits = {"max_side": 64, "cache_mb": 2, "max_body_mb": 2, "max_waiting": 10}
    headers = {"X-API-Key": KEY[0]}
    with pytest.MonkeyPatch.context() as patch:  # running sets these where they are missing
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_max_direct_call_object_size", str(2 << 20))
        patch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        with (
            running(Settings.of({"store": store.url, "keys": keys, **limits}), port=port) as url,
            httpx.Client(base_url=url, timeout=60, headers=headers) as client,
        ):
            yield client


def test_requests_at_once_get_their_own_adapters(client, store):
    wanted = {concept: expected(store, concept) for concept in ("fog", "ink")}

    def ask(number):
        concept = ("fog", "ink")[number % 2]
        response = client.post(f"/v1/edit/{concept}", content=BODY)
        assert response.headers["x-adapter-digest"] == Registry(store).get(concept).digest
        return np.abs(pixels(response).astype(int) - wanted[concept]).max()

    with ThreadPoolExecutor(6) as threads:
        assert max(threads.map(ask, range(24))) <= 2  # replicas may compute with other thread counts


def test_the_rest_of_the_interface(client):
    until(lambda: client.get("/healthz").json() == {"status": "ok"})
    assert [row["id"] for row in client.get("/v1/concepts").json()["concepts"]] == ["fog", "ink"]
    assert client.get("/v1/concepts", headers={"X-API-Key": "farm_x"}).status_code == 401
    several = client.post("/v1/edit?concept=ink&concept=no", files={"image": BODY}).json()["edits"]
    assert [edit["status"] for edit in several] == [200, 404]
    assert 'farm_replica_photos_total{replica="' in client.get("/metrics").text
    assert "<title>" in client.get("/").text
    webp = client.post("/v1/edit/ink", content=BODY, headers={"Accept": "image/webp"})
    assert PIL.Image.open(io.BytesIO(webp.content)).format == "WEBP"


def test_errors_are_problem_documents(client):
    def chunks():
        for _ in range(30):
            yield bytes(100_000)

    answers = {
        404: client.post("/v1/edit/inkk", content=BODY),
        400: client.post("/v1/edit/ink", content=BODY[:-100]),
        415: client.post("/v1/edit/ink", content=b"<svg/>"),
        405: client.get("/v1/edit/ink"),
        413: client.post("/v1/edit/ink", content=chunks()),
    }
    for status, answer in answers.items():
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
        assert answer.json()["status"] == status
    assert answers[404].json()["near"] == ["ink"]
    assert client.post("/v1/edit/ink", content=bytes(3_000_000)).status_code == 413


def test_a_new_version_is_served_without_a_restart(client, store):
    before = pixels(client.post("/v1/edit/fog", content=BODY))
    entry = publish(store, "fog", seed=11)
    until(lambda: client.post("/v1/edit/fog", content=BODY).headers["x-adapter-version"] == "2")
    answer = client.post("/v1/edit/fog", content=BODY)
    assert answer.headers["x-adapter-digest"] == entry.digest
    assert np.abs(pixels(answer).astype(int) - before).mean() > 5
    old = client.post("/v1/edit/fog?version=1", content=BODY)
    assert np.abs(pixels(old).astype(int) - before).max() == 0


def test_administrators_reach_every_replica(client):
    client.post("/v1/edit/ink", content=BODY)
    for call in (client.post("/v1/admin/pin/ink"), client.post("/v1/admin/evict/fog"), client.post("/v1/admin/reload")):
        assert (call.status_code, call.json()) == (200, {"replicas": 1})
    assert client.post("/v1/admin/pin/nothing").status_code == 404
    until(lambda: re.search(r"farm_replica_pinned{[^}]*} 1.0", client.get("/metrics").text))


def test_only_this_machine_can_connect(client):
    import psutil
    import ray

    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", client.base_url.port))
    if ray.util.get_node_ip_address() != "127.0.0.1":
        pytest.skip("ray was imported before run could tell it to stay on 127.0.0.1")
    ports = []
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            ports += process.net_connections("tcp")
    listening = [port for port in ports if port.status == "LISTEN"]
    assert {port.laddr.ip.removeprefix("::ffff:") for port in listening} == {"127.0.0.1"}


def test_serve_is_not_started_twice(client, store):
    for port, sentence in ((client.base_url.port, "choose another port"), (free_port(), "runs already")):
        with pytest.raises(UserError, match=sentence), running(Settings.of({"store": store.url}), port=port):
            pass
