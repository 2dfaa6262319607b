"""A farm small enough for unit tests: a narrow random base and adapters that visibly differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from e2gan.config import GeneratorConfig
from e2gan.infer import adapted_generator, edit_photo
from e2gan.lora import crucial_layers, new_adapter
from e2gan.lora_peft import load, save
from e2gan.model import build_generator
from e2gan.pairs import Image
from farm.artifacts import Spec, commit
from farm.registry import Entry, Registry
from farm.store import LocalStore

CONFIG = GeneratorConfig(channels=8)
SIDE = 64


class TinyFarm:
    """A store with one base; `publish` adds concepts."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        self.registry = Registry(self.store)
        self.base = self.add_base(seed=0)

    def add_base(self, *, seed: int) -> str:
        spec = Spec(stage="pretrain", version=1, folder="bases", seed=seed)
        weights = build_generator(CONFIG, seed=seed).state_dict()
        files = {
            "config.json": json.dumps(asdict(CONFIG)).encode(),
            "generator.safetensors": safetensors.torch.save(weights),
        }
        return commit(self.store, spec, files, wall_seconds=0).digest

    def publish(self, concept: str, *, seed: int, base: str | None = None, fits: str | None = None) -> Entry:
        """Publish a random adapter of `base`; `fits` makes its own file name another one."""
        base = base or self.base
        random = torch.Generator().manual_seed(seed)
        generator = build_generator(CONFIG, seed=0)
        adapter = new_adapter(generator, dict.fromkeys(crucial_layers(generator), 2), seed=seed)
        for name, tensor in adapter.tensors.items():
            if name.endswith(".lora_B"):
                tensor.normal_(0, 0.5, generator=random)
        files = save(adapter, base=fits or base)
        files["text.safetensors"] = safetensors.torch.save({"text": torch.randn(77, 768, generator=random)})
        spec = Spec(stage="adapt", version=1, folder=f"adapters/{concept}", inputs={"base": base}, seed=seed)
        manifest = commit(self.store, spec, files, wall_seconds=0)
        return self.registry.publish(
            concept, adapter=manifest.path, digest=manifest.digest, base=base, metrics={"l1": seed / 100}
        )

    def edit(self, concept: str, photo: Image) -> Image:
        """What the published version makes of the photo, computed without a bank."""
        entry = self.registry.get(concept)
        assert entry is not None

        def read(path: str) -> Callable[[str], bytes]:
            return lambda name: self.store.get(f"{path}/{name}")

        adapter_file, base_file = read(entry.adapter), read(f"bases/{entry.base}")
        files = {name: adapter_file(name) for name in ("adapter_config.json", "adapter_model.safetensors")}
        weights = safetensors.torch.load(base_file("generator.safetensors"))
        generator = adapted_generator(CONFIG, weights, load(files, base=entry.base))
        text = safetensors.torch.load(adapter_file("text.safetensors"))["text"]
        return edit_photo(generator, text, photo, longest_side=SIDE)


def three_concepts(root: Path) -> TinyFarm:
    """A farm that publishes charcoal, fog and ink."""
    farm = TinyFarm(root)
    for seed, concept in enumerate(("charcoal", "fog", "ink"), start=1):
        farm.publish(concept, seed=seed)
    return farm
