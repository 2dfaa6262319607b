import pytest
import torch
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.infer import adapted_generator
from e2gan.lora import Adapter, crucial_layers, new_adapter
from e2gan.model import Generator, build_generator
from e2gan.pairs import to_bytes, to_unit
from e2gan.stacked import StackedAdapters

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base() -> Generator:
    generator = build_generator(TINY, seed=0)
    with torch.no_grad():
        generator.head.weight *= 20  # edits over the whole range of values
    return generator


def adapter(seed: int, ranks: dict[str, int] | None = None) -> Adapter:
    """Every crucial layer at ranks 1..3, unless said otherwise."""
    ranks = ranks or {name: 1 + (i + seed) % 3 for i, name in enumerate(crucial_layers(base()))}
    made = new_adapter(base(), ranks, seed=0)
    tensors = {name: 0.1 * noise(*t.shape, seed=100 * seed + i) for i, (name, t) in enumerate(made.tensors.items())}
    return Adapter(ranks=ranks, scale=0.5 + seed, tensors=tensors)


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


ADAPTERS = [adapter(0), adapter(1, {"stem": 4, "up2": 1}), adapter(2, {"head": 2}), adapter(3)]
TEXTS = [noise(3, 5, seed=seed) for seed in range(4)]


def stacked(count: int = 4, *, compile: bool = False) -> StackedAdapters:
    made = StackedAdapters(base(), dtype=torch.float32, compile=compile)
    assert [made.add(ADAPTERS[i], TEXTS[i]) for i in range(count)] == list(range(count))
    return made


def one_by_one(batch: Tensor, which: list[int]) -> Tensor:
    merged = [adapted_generator(TINY, base().state_dict(), each) for each in ADAPTERS]
    with torch.no_grad():
        return torch.cat([to_bytes(merged[w](to_unit(batch[i : i + 1]), TEXTS[w][None])) for i, w in enumerate(which)])


def assert_same(edited: Tensor, expected: Tensor) -> None:
    """Equal but for rounding: bytes one apart, and few of them."""
    assert edited.dtype == torch.uint8
    assert (edited.int() - expected.int()).abs().max() <= 1
    assert (edited == expected).float().mean() > 0.99


@pytest.mark.parametrize("which", [[2], [0, 1, 2, 3], [3, 3, 0, 3, 1]])
def test_a_mixed_batch_is_what_the_merged_adapters_make_one_by_one(which: list[int]) -> None:
    batch = images(len(which))
    edited = stacked()(batch, torch.tensor(which))
    assert edited.shape == batch.shape
    assert_same(edited, one_by_one(batch, which))


def test_the_adapters_differ() -> None:
    edited = stacked()(images(1).expand(4, -1, -1, -1), torch.arange(4)).float()
    differences = (edited[:, None] - edited).abs().mean((2, 3, 4))
    assert (differences + 1000 * torch.eye(4)).min() > 2


def test_adding_an_adapter_leaves_the_others() -> None:
    adapters = stacked(2)
    before, size = adapters(images(2), torch.tensor([0, 1])), adapters.nbytes
    assert adapters.add(ADAPTERS[3], TEXTS[3]) == 2
    assert len(adapters) == 3
    assert adapters.nbytes > size
    assert_same(adapters(images(2), torch.tensor([0, 1])), before)


def test_in_bf16() -> None:
    adapters = StackedAdapters(base(), dtype=torch.bfloat16)
    for each, text in zip(ADAPTERS, TEXTS, strict=True):
        adapters.add(each, text)
    edited = adapters(images(4), torch.arange(4))
    difference = (edited.float() - one_by_one(images(4), [0, 1, 2, 3]).float()).abs()
    assert 0 < difference.mean() < 6


def test_the_base_is_not_changed() -> None:
    generator = base()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    StackedAdapters(generator, dtype=torch.bfloat16).add(ADAPTERS[0], TEXTS[0])
    assert generator.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
    assert all(p.requires_grad for p in generator.parameters())


def test_adding_and_mixing_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    plain_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: plain_compile(function, backend=counter, **options)
    )
    torch._dynamo.reset()
    adapters = stacked(2, compile=True)
    adapters(images(3), torch.tensor([0, 1, 1]))
    graphs = counter.frame_count
    assert graphs > 0
    adapters.add(adapter(4, {"stem": 2, "down1": 1}), TEXTS[2])  # no rank above the first two's
    edited = adapters(images(3), torch.tensor([1, 2, 0]))
    assert counter.frame_count == graphs
    assert_same(edited[::2], one_by_one(images(3), [1, 2, 0])[::2])


def test_without_transformer() -> None:
    bare = GeneratorConfig(channels=4, transformer_blocks=0, text_tokens=3, text_width=5)
    generator = build_generator(bare, seed=0)
    adapters = StackedAdapters(generator, dtype=torch.float32)
    adapters.add(new_adapter(generator, {"down1": 2}, seed=0), TEXTS[0])
    with torch.no_grad():
        expected = to_bytes(generator(to_unit(images(2))))
    assert_same(adapters(images(2), torch.tensor([0, 0])), expected)


def test_an_adapter_for_another_generator() -> None:
    wide = GeneratorConfig(channels=8, heads=2, text_tokens=3, text_width=5)
    other = new_adapter(build_generator(wide, seed=0), {"up1": 2}, seed=0)
    adapters = stacked(1)
    with pytest.raises(ValueError, match="this adapter does not fit the generator: up1"):
        adapters.add(other, TEXTS[0])
    assert len(adapters) == 1


def test_sides_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="multiples of 8 and at least 16, not 16x20"):
        stacked(1)(torch.zeros(1, 3, 16, 20, dtype=torch.uint8), torch.tensor([0]))
