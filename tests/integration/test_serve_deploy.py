"""`serve deploy serve.yaml` on a Ray head with token authentication."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from ports import free_port
from ray_head import RAY, ROOT, ray_head
from tiny_farm import TinyFarm

from farm.images import encode
from farm.serve.access import new_key

pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

SERVE = RAY.with_name("serve")
PHOTO = encode(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8), "png")


def test_serve_yaml_is_deployed_and_edits(tmp_path: Path) -> None:
    farm = TinyFarm(tmp_path / "store")
    entry = farm.publish("ink", seed=2)
    key, hashed = new_key()
    document = yaml.safe_load((ROOT / "serve.yaml").read_text())
    document["http_options"]["port"] = port = free_port()
    (application,) = document["applications"]
    application["args"] |= {"store": farm.store.url, "max_side": 64, "keys": [{"name": "user", "sha256": hashed}]}
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    deployed = tmp_path / "serve.yaml"
    deployed.write_text(yaml.safe_dump(document))
    with ray_head(tmp_path) as head:
        environment = {**head.environment, "RAY_DASHBOARD_ADDRESS": head.url, "RAY_API_SERVER_ADDRESS": head.url}
        without = subprocess.run(
            [SERVE, "deploy", deployed],
            env={**environment, "RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
        )
        assert without.returncode != 0
        done = subprocess.run([SERVE, "deploy", deployed], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 600
            while True:
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                status = subprocess.run([SERVE, "status"], env=environment, capture_output=True, text=True).stdout
                assert time.monotonic() < deadline and "DEPLOY_FAILED" not in status, status
                time.sleep(1)
            assert client.post("/v1/edit/ink", content=PHOTO).status_code == 401
            answer = client.post("/v1/edit/ink", content=PHOTO, headers={"Authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.headers["x-adapter-digest"]) == (200, entry.digest)
