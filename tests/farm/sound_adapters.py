"""Adapters that are sound and do nothing, to publish."""

from __future__ import annotations

import os
import signal
from typing import Any

from farm.artifacts import Spec, commit
from farm.store import Store

BASE = Spec(stage="base", version=1, folder="bases", config={"name": "b0"})


def adapter_spec(concept: str, name: str) -> Spec:
    folder, inputs = f"adapters/{concept}", {"base": BASE.digest}
    return Spec(stage="adapter", version=1, folder=folder, config={"name": name}, inputs=inputs)


def put_adapter(store: Store, concept: str, name: str, **metrics: float) -> dict[str, Any]:
    """Commit an adapter of that name, and its base; what `Registry.publish` is to be told of it."""
    commit(store, BASE, {"generator.safetensors": b"base"}, wall_seconds=0)
    files = {"adapter_model.safetensors": f"{concept} {name}".encode(), "metrics.json": b"{}"}
    made = commit(store, adapter_spec(concept, name), files, wall_seconds=0)
    return {"adapter": made.path, "digest": made.digest, "base": BASE.digest, "metrics": metrics}


class Dying:
    """A store whose process is killed before its call number `calls`, counted from 0, or right after it."""

    def __init__(self, store: Store, calls: int, *, after: bool = False) -> None:
        self.store, self.left, self.after = store, calls, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)
        if not callable(method):
            return method

        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = method(*arguments)
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return call


def killed(work: Any) -> bool:
    """Do the work in a process of its own; whether it was killed. It must not fail otherwise."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"the process ended with {status}"
    return status != 0
