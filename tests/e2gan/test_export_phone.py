from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import TINY, mixed_ranks, noise, tiny, trained
from hypothesis import given
from hypothesis import strategies as st

from e2gan.config import GeneratorConfig
from e2gan.export.parity import IDENTICAL, certificate, judge, parity, server_edits, shown
from e2gan.export.phone import PhoneGenerator, concept_parameters, concept_tensors, random_concept
from e2gan.infer import adapted_generator
from e2gan.lora import Adapter, lora_sizes, new_adapter
from e2gan.lora_truncate import truncate
from e2gan.model import build_generator
from e2gan.pairs import to_unit

PHOTOS = (noise(2, 3, 16, 16, seed=5) * 60 + 128).clamp(0, 255).byte()
TEXT = noise(3, 5, seed=6)


def test_branches_and_folded_text_are_the_merged_network() -> None:
    base, adapter = tiny(), trained(mixed_ranks(), scale=0.5)
    network = PhoneGenerator(base, concept_tensors(base, adapter, TEXT))
    merged = adapted_generator(TINY, base.state_dict(), adapter)
    with torch.no_grad():
        for photo in PHOTOS:
            exact = (merged(to_unit(photo[None]), TEXT[None]) + 1) * 127.5
            assert (network(photo[None].float()) - exact).abs().max() <= 0.5 + 1e-3  # it rounds
    assert torch.equal(base.stem.weight, tiny().stem.weight)


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, cross_attention=False),
        replace(TINY, transformer_sampling="pool", transformer_blocks=2),
        replace(TINY, transformer_blocks=0),
    ],
)
def test_other_generators(config: GeneratorConfig) -> None:
    base = build_generator(config, seed=0)
    adapter = new_adapter(base, {"stem": 1, "up2": 2}, seed=0)
    for tensor in adapter.tensors.values():
        tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    network = PhoneGenerator(base, concept_tensors(base, adapter, TEXT))
    with torch.no_grad():
        found = torch.cat([network(photo[None].float()) for photo in PHOTOS]).byte()
    assert (found.int() - server_edits(base, adapter, TEXT, PHOTOS).int()).abs().max() <= 1


def test_what_a_concept_adds() -> None:
    base, ranks = tiny(), mixed_ranks()
    concept = concept_tensors(base, trained(ranks), TEXT)
    folded = {f"transformer.0.cross_attention.{side}" for side in "kv"}
    branches = sum(size * ranks[name] for name, size in lora_sizes(base).items() if name not in folded)
    assert concept_parameters(concept) == branches + 2 * TEXT.shape[0] * 4 * TINY.channels
    like = random_concept(base, ranks, seed=1)
    assert {name: tensor.shape for name, tensor in like.items()} == {n: t.shape for n, t in concept.items()}
    with pytest.raises(ValueError, match=r"'residual\.0\.conv1' is not a crucial layer"):
        random_concept(base, {"residual.0.conv1": 1}, seed=0)


@given(st.integers(0, 255), st.integers(1, 40))
def test_psnr_of_a_known_difference(level: int, off: int) -> None:
    """Of pictures that differ by one number everywhere: 20 log10(255 / number)."""
    a = torch.full((1, 3, 8, 8), level, dtype=torch.uint8)
    other = level + off if level + off <= 255 else level - off
    b = torch.full_like(a, other)
    assert parity(a, b).psnr[0] == pytest.approx(20 * torch.log10(torch.tensor(255 / off)).item(), abs=1e-4)
    assert parity(a, b).largest == off and parity(a, a).psnr == (IDENTICAL,)
    with pytest.raises(ValueError, match="were to be of shape"):
        parity(a, b[:, :, 1:])


def test_the_worst_photo_decides_and_is_shown() -> None:
    found = PHOTOS.clone()
    found[1] ^= 8
    one = judge(lambda photos: found, PHOTOS, PHOTOS, limit=40)
    assert one.parity.worst == 1 and one.reason == (
        "its worst photo differs from the server's edit by 30.1 dB PSNR, at least 40 are asked for"
    )
    same = judge(lambda photos: photos, PHOTOS, PHOTOS, limit=40)
    told = certificate({"a": one, "b": same}, limit=40, photos=2, computed="here")
    assert (told["passed"], told["functions"]["a"]["passed"], told["functions"]["b"]["passed"]) == (False, False, True)
    assert told["functions"]["a"]["worst_photo"] == 1 and told["functions"]["a"]["largest_difference"] == 8
    rows = shown({"a": one, "b": same})
    assert [row.shape[0] for row in rows] == [2] * 4
    assert torch.equal(rows[2][0], found[1]) and rows[3][0].unique().tolist() == [128] and not rows[3][1].any()


# An adapter cut to lower ranks


def full_update(adapter: Adapter) -> dict[str, torch.Tensor]:
    from e2gan.lora import merge

    base = tiny()
    return {n: w - base.state_dict()[n] for n, w in merge(base, adapter).items()}


def test_a_truncated_update_is_the_nearest_of_its_rank() -> None:
    adapter = trained(dict.fromkeys(mixed_ranks(), 3), scale=2.0)
    cut, kept = truncate(adapter, tiny(), dict.fromkeys(adapter.ranks, 1))
    before, after = full_update(adapter), full_update(cut)
    total = left = 0.0
    for name, tensor in before.items():
        # numpy's SVD of the whole update, laid out as its factors are: rows out, columns everything else.
        matrix = tensor.transpose(0, 1) if name.startswith(("up", "transformer.0.up")) else tensor
        u, s, v = torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False)
        nearest = (u[:, :1] * s[:1] @ v[:1]).float()
        got = after[name].transpose(0, 1) if name.startswith(("up", "transformer.0.up")) else after[name]
        torch.testing.assert_close(got.flatten(1), nearest, atol=1e-5, rtol=1e-4)
        total, left = total + float(s.square().sum()), left + float(s[:1].square().sum())
    assert kept == pytest.approx(left / total, rel=1e-4) and set(cut.ranks.values()) == {1}


def test_ranks_that_are_low_enough_stay() -> None:
    adapter = trained(mixed_ranks())
    same, kept = truncate(adapter, tiny(), {"stem": 9})
    assert kept == pytest.approx(1)
    for name, tensor in full_update(adapter).items():
        torch.testing.assert_close(full_update(same)[name], tensor, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="rank of stem must be at least 1, not 0"):
        truncate(adapter, tiny(), {"stem": 0})
