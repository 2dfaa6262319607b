import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2gan.config import GeneratorConfig
from e2gan.infer import Switcher, adapted_generator, base_generator, edit_images, edit_photo
from e2gan.lora import Adapter, merge, new_adapter
from e2gan.lora_attach import attach
from e2gan.model import Generator, build_generator
from e2gan.pairs import Image, to_bytes, to_tensor, to_unit

TINY = GeneratorConfig(channels=4, heads=2, text_tokens=3, text_width=5)
SMALLEST = GeneratorConfig(channels=1, heads=1, text_tokens=3, text_width=5)


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full precision, whatever this machine's processor computes in."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photo(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def weights(config: GeneratorConfig = TINY) -> dict[str, Tensor]:
    """Weights whose edits use the whole range of values."""
    state = build_generator(config, seed=0).state_dict()
    state["head.weight"] = state["head.weight"] * 20
    return state


def adapter() -> Adapter:
    made = new_adapter(
        build_generator(TINY, seed=0), {"stem": 2, "up1": 3, "transformer.0.self_attention.q": 1}, seed=0
    )
    tensors = {name: 0.1 * noise(*tensor.shape, seed=i) for i, (name, tensor) in enumerate(made.tensors.items())}
    return Adapter(ranks=made.ranks, scale=0.5, tensors=tensors)


def images(n: int = 5) -> Tensor:
    return to_tensor(photo(16, 24, seed) for seed in range(n))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_edit_images_is_the_plain_forward(batch_size: int) -> None:
    generator, text = base_generator(TINY, weights()), noise(3, 5)
    edited = edit_images(generator, text, images(), batch_size=batch_size)
    assert edited.dtype == torch.uint8
    assert edited.shape == images().shape
    plain = build_generator(TINY, seed=1)
    plain.load_state_dict(weights())
    with torch.no_grad():
        expected = to_bytes(plain(to_unit(images()), text.expand(5, 3, 5)))
    assert (edited.int() - expected.int()).abs().max() <= 1  # rounding of another batch size
    assert (edited == expected).float().mean() > 0.99
    assert edited.max() - edited.min() > 100


def test_edit_images_in_bf16_where_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, text = base_generator(TINY, weights()), noise(3, 5)
    exact = edit_images(generator, text, images())
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    rough = edit_images(generator, text, images())
    assert not torch.equal(exact, rough)
    assert (exact.float() - rough.float()).abs().mean() < 4


def test_base_generator_is_ready_for_inference() -> None:
    state = weights()
    generator = base_generator(TINY, state)
    assert not generator.training
    assert not any(p.requires_grad for p in generator.parameters())
    assert all(generator.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())


def test_adapted_generator_equals_attach() -> None:
    attached: Generator = build_generator(TINY, seed=1)
    attached.load_state_dict(weights())
    attach(attached, adapter())
    x, text = to_unit(images()), noise(1, 3, 5)
    with torch.no_grad():
        expected = attached(x, text)
        merged = adapted_generator(TINY, weights(), adapter())(x, text)
        untouched = base_generator(TINY, weights())(x, text)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert (merged - untouched).abs().max() > 0.05


def test_adapted_generators_share_the_base() -> None:
    state = weights()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    generator = adapted_generator(TINY, state, adapter())
    changed = merge(base_generator(TINY, state), adapter()).keys()
    assert changed == {"stem.weight", "up1.weight", "transformer.0.self_attention.q.weight"}
    for name, weight in generator.state_dict().items():
        assert (weight.data_ptr() == state[name].data_ptr()) == (name not in changed), name
        assert torch.equal(state[name], copies[name]), f"the base's {name} changed"


def wrong_weights() -> list[dict[str, Tensor]]:
    wide = GeneratorConfig(channels=8, heads=2, text_tokens=3, text_width=5)
    missing, extra = weights(), weights()
    del missing["stem.bias"]
    return [{}, weights(wide), missing, extra | {"nonsense": torch.zeros(1)}]


@pytest.mark.parametrize("state", wrong_weights(), ids=["none", "wider", "one missing", "one more"])
def test_weights_that_do_not_fit(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"these weights do not fit GeneratorConfig\(channels=4"):
        base_generator(TINY, state)
    with pytest.raises(ValueError, match="these weights do not fit"):
        adapted_generator(TINY, state, adapter())


def test_an_adapter_that_does_not_fit() -> None:
    bare = GeneratorConfig(channels=4, transformer_blocks=0)
    with pytest.raises(ValueError, match=r"'transformer\.0\.self_attention\.q' is not a crucial layer"):
        adapted_generator(bare, weights(bare), adapter())


def test_a_photo_of_fitting_size_is_not_resampled() -> None:
    generator, text = base_generator(TINY, weights()), noise(3, 5)
    whole = edit_photo(generator, text, photo(24, 40), longest_side=64)
    direct = edit_images(generator, text, to_tensor([photo(24, 40)]))[0].permute(1, 2, 0)
    np.testing.assert_array_equal(whole, direct.numpy())
    assert whole.dtype == np.uint8


SMALL = base_generator(SMALLEST, weights(SMALLEST))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(16, 100))
def test_edit_photo_sizes(height: int, width: int, longest_side: int) -> None:
    edited = edit_photo(SMALL, noise(3, 5), photo(height, width), longest_side=longest_side)
    factor = min(1.0, longest_side / max(height, width))
    for side, wanted in ((edited.shape[0], height * factor), (edited.shape[1], width * factor)):
        assert side % 8 == 0
        assert 16 <= side <= longest_side
        assert abs(side - wanted) < 8 or side == 16  # aspect kept up to the rounding
    assert edited.shape[2] == 3


def test_edit_photo_needs_room() -> None:
    with pytest.raises(ValueError, match="longest_side must be at least 16, not 15"):
        edit_photo(SMALL, noise(3, 5), photo(32, 32), longest_side=15)


def test_edit_images_needs_fitting_sides() -> None:
    with pytest.raises(ValueError, match="multiples of 8 and at least 16, not 20x24"):
        edit_images(SMALL, noise(3, 5), torch.zeros(1, 3, 20, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 8 and at least 16, not 8x24"):
        edit_images(SMALL, noise(3, 5), torch.zeros(1, 3, 8, 24, dtype=torch.uint8))


def adapters() -> list[Adapter]:
    """Two that adapt different layers."""
    second = new_adapter(build_generator(TINY, seed=0), {"stem": 1, "down2": 2, "head": 1}, seed=0)
    tensors = {name: 0.1 * noise(*tensor.shape, seed=9 + i) for i, (name, tensor) in enumerate(second.tensors.items())}
    return [adapter(), Adapter(ranks=second.ranks, scale=1.0, tensors=tensors)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rewrite", [False, True])
def test_switching_is_the_adapted_generator(rewrite: bool, channels_last: bool) -> None:
    switcher = Switcher(base_generator(TINY, weights()), rewrite=rewrite, channels_last=channels_last, compile=False)
    for made, text in ((adapters()[0], noise(3, 5)), (adapters()[1], noise(3, 5, seed=1))):
        edited = switcher(switcher.merge(made, text), images())
        expected = edit_images(adapted_generator(TINY, weights(), made), text, images())
        assert edited.dtype == torch.uint8
        assert (edited.int() - expected.int()).abs().max() <= 1  # rounding of another order of sums
        assert (edited == expected).float().mean() > 0.99
    untouched = edit_images(base_generator(TINY, weights()), noise(3, 5), images())
    assert (switcher(switcher.merge(None, noise(3, 5)), images()) == untouched).float().mean() > 0.99


@pytest.mark.parametrize("rewrite", [False, True])
def test_switching_in_bf16(rewrite: bool) -> None:
    switcher = Switcher(base_generator(TINY, weights()), dtype=torch.bfloat16, rewrite=rewrite, compile=False)
    edited = switcher(switcher.merge(adapter(), noise(3, 5)), images())
    exact = edit_images(adapted_generator(TINY, weights(), adapter()), noise(3, 5), images())
    assert 0 < (edited.float() - exact.float()).abs().mean() < 6


def test_switching_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    plain_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: plain_compile(function, backend=counter, **options)
    )
    torch._dynamo.reset()
    switcher = Switcher(base_generator(TINY, weights()))
    a, b = (switcher.merge(made, noise(3, 5, seed=i)) for i, made in enumerate(adapters()))
    first = switcher(a, images())
    graphs = counter.frame_count
    assert graphs > 0
    other, again = switcher(b, images()), switcher(a, images())
    switcher(switcher.merge(None, noise(3, 5)), images())
    assert counter.frame_count == graphs
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    expected = edit_images(adapted_generator(TINY, weights(), adapters()[0]), noise(3, 5), images())
    assert (first == expected).float().mean() > 0.99

    switcher(a, images()[:, :, :, :16])  # another shape, another graph, once
    switcher(b, images()[:, :, :, :16])
    switcher(b, images())
    assert counter.frame_count == graphs + 1


def test_the_compiled_graph_edits_the_same() -> None:
    switcher = Switcher(base_generator(TINY, weights()))
    for made in adapters():
        edited = switcher(switcher.merge(made, noise(3, 5)), images(1))
        expected = edit_images(adapted_generator(TINY, weights(), made), noise(3, 5), images(1))
        assert (edited.int() - expected.int()).abs().max() <= 1
        assert (edited == expected).float().mean() > 0.99


def test_merged_adapters_share_the_base() -> None:
    base = base_generator(TINY, weights())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    switcher = Switcher(base, dtype=torch.bfloat16, compile=False)
    a, b = (switcher.merge(made, noise(3, 5)) for made in adapters())
    own = {"stem.weight", "up1.weight", "transformer.0.self_attention.q.weight"}
    assert a.nbytes == 2 * (sum(before[name].numel() for name in own) + 3 * 5)
    for name in a.weights:
        shared = a.weights[name].data_ptr() == b.weights[name].data_ptr()
        assert shared == (name not in own | {"down2.weight", "head.weight"}), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_switcher_refuses_what_does_not_fit() -> None:
    switcher = Switcher(base_generator(SMALLEST, weights(SMALLEST)), compile=False)
    with pytest.raises(ValueError, match="this adapter does not fit the generator"):
        switcher.merge(adapter(), noise(3, 5))
    with pytest.raises(ValueError, match="multiples of 8 and at least 16, not 20x24"):
        switcher(switcher.merge(None, noise(3, 5)), torch.zeros(1, 3, 20, 24, dtype=torch.uint8))
