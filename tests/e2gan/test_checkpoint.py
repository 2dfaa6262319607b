import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2gan.checkpoint import CheckpointFolder, Network, pack, unpack
from e2gan.weights import load_weights, save_weights

IDENTITY = {"config": {"betas": (0.5, 0.999)}, "seed": 3, "concepts": ["a", "b"]}


def network(width: int = 3, *, updates: int = 0, averaged: bool = True, seed: int = 0) -> Network:
    """A layer under AdamW after some updates, with averages that are halves of the weights."""
    layer = nn.Linear(2, width)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=random))
    parameters = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    made = Network(parameters=parameters, optimizer=optimizer, averages={})
    for _ in range(updates):
        update(made)
    averages = {name: p.detach() / 2 for name, p in parameters.items()} if averaged else {}
    return dataclasses.replace(made, averages=averages)


def update(made: Network) -> None:
    for parameter in made.parameters.values():
        parameter.grad = parameter.detach().square()
    made.optimizer.step()


def networks(updates: int = 0, seed: int = 0) -> dict[str, Network]:
    return {
        "generator": network(updates=updates, seed=seed),
        "discriminator": network(updates=0, averaged=False, seed=seed + 1),
    }


CHECKPOINT = pack(12, IDENTITY, networks(updates=2))


def state(given_: dict[str, Network]) -> list[object]:
    """All that `unpack` may write, as it is now."""
    return copy.deepcopy(
        [
            [part.detach().tolist() for part in (*made.parameters.values(), *made.averages.values())]
            + [[{k: v.tolist() for k, v in s.items()} for s in made.optimizer.state.values()]]
            for made in given_.values()
        ]
    )


def test_what_is_unpacked_is_what_was_packed() -> None:
    original, fresh = networks(updates=2), networks(seed=5)
    assert state(fresh) != state(original)
    assert unpack(CHECKPOINT, IDENTITY, fresh) == 12
    assert state(fresh) == state(original)
    assert pack(12, IDENTITY, fresh) == CHECKPOINT
    for given_ in (original, fresh):
        update(given_["generator"])
        update(given_["discriminator"])  # without moments in the checkpoint: these start from nothing
    assert state(fresh) == state(original)


def test_moments_take_the_memory_format_of_their_weights() -> None:
    def convolution() -> Network:
        layer = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = dict(layer.named_parameters())
        return Network(parameters=parameters, optimizer=torch.optim.Adam(parameters.values(), fused=True), averages={})

    original, fresh = convolution(), convolution()
    update(original)
    unpack(pack(1, {}, {"x": original}), {}, {"x": fresh})
    weight = fresh.parameters["weight"]
    moment = fresh.optimizer.state[weight]["exp_avg"]
    assert moment.stride() == weight.stride() != torch.empty(4, 2, 3, 3).stride()
    assert torch.equal(moment, original.optimizer.state[original.parameters["weight"]]["exp_avg"])


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({**IDENTITY, "seed": 4}, "its seed differ"),
        ({**IDENTITY, "config": {"betas": (0.9, 0.999)}, "concepts": []}, "its config, concepts differ"),
        ({**IDENTITY, "more": 1}, "its more differ"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(identity: dict[str, object], named: str) -> None:
    fresh = networks(seed=5)
    before = state(fresh)
    with pytest.raises(ValueError, match=f"belongs to another training run: {named}; remove it"):
        unpack(CHECKPOINT, identity, fresh)
    assert state(fresh) == before


def edited(change: Callable[[dict[str, Tensor]], object]) -> bytes:
    """The checkpoint with other tensors, under a digest that holds."""
    tensors, metadata = load_weights(CHECKPOINT)
    change(tensors)
    return save_weights(tensors, **metadata)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("discriminator/bias"), "discriminator bias"),
        (lambda t: t.pop("generator/bias/average"), "generator bias average"),
        (lambda t: t.update({"generator/weight": torch.zeros(4, 2)}), "generator weight"),
        (lambda t: t.update({"generator/weight/exp_avg": torch.zeros(4, 2)}), "generator weight exp_avg"),
        (lambda t: t.update({"generator/weight/step": torch.zeros(2)}), "generator weight step"),
        (lambda t: t.update({"generator/weight/average": torch.zeros(3, 1)}), "generator weight average"),
        (lambda t: t.update({"generator/deeper.weight": torch.zeros(1)}), "generator deeper.weight"),
        (lambda t: t.update({"critic/weight": torch.zeros(1)}), "critic weight"),
    ],
)
def test_nothing_changes_where_a_checkpoint_does_not_fit(
    change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    fresh = networks(seed=5)
    before = state(fresh)
    with pytest.raises(ValueError, match=f"belongs to another network: {named} differs"):
        unpack(edited(change), IDENTITY, fresh)
    assert state(fresh) == before


def test_other_weights_are_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="not a training checkpoint"):
        unpack(save_weights({"generator/weight": torch.zeros(3, 2)}), IDENTITY, networks())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(CHECKPOINT) - 1), st.integers(0, 255))
def test_a_damaged_checkpoint_is_refused(place: int, change: int) -> None:
    """Cut off at any place (change 0), or with any byte of it another one."""
    damaged = bytearray(CHECKPOINT) if change else bytearray(CHECKPOINT[:place])
    if change:
        damaged[place] ^= change
    fresh = networks(seed=5)
    before = state(fresh)
    with pytest.raises(ValueError, match=r"not a whole safetensors file|changed after they were saved"):
        unpack(bytes(damaged), IDENTITY, fresh)
    assert state(fresh) == before


def test_the_identity_can_be_read_by_anyone() -> None:
    training = json.loads(load_weights(CHECKPOINT)[1]["training"])
    assert training == {"step": 12, "identity": json.loads(json.dumps(IDENTITY))}


# The folder


def test_a_folder_keeps_the_newest_two(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "new" / "run")
    assert folder.latest() is None
    for step in (1, 2, 9, 10, 100):
        folder.save(step, b"%d" % step)
        assert folder.latest() == b"%d" % step
        assert CheckpointFolder(str(folder.path)).latest() == b"%d" % step
        assert len(list(folder.path.iterdir())) <= 2
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000010.safetensors", "00000100.safetensors"]


def test_a_save_that_was_interrupted_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, b"whole")

    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.save(2, b"never whole")
    assert folder.latest() == b"whole"
    assert (tmp_path / "00000002.partial").exists()
    folder.save(2, b"now whole")
    assert folder.latest() == b"now whole"
    assert not list(tmp_path.glob("*.partial"))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(3, b"one")
    folder.save(3, b"two")
    assert folder.latest() == b"two"
    assert len(list(tmp_path.iterdir())) == 1
