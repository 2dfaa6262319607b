"""Seconds an image of inference, as JSON lines: every variant in one run, in turn, so that ratios hold.

    python bench/infer.py [--side 256] [--repeats 15] [--quick] [--only TEXT ...]

The reference of each batch size is pix2pix with nine residual blocks, plain eager fp32; `ratio` is to it, lower is
better. Images go in and come out as bytes. `difference` is the mean one to E2GAN's eager fp32 output, in 0..255.
`adapters` take turns from call to call; in a mixed batch every image has another one. The weights are random.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor, nn

from e2gan.config import GeneratorConfig, pix2pix_nine_blocks
from e2gan.fast import fast_generator
from e2gan.infer import Switcher
from e2gan.lora import Adapter, crucial_layers, merge, new_adapter, searched_ranks
from e2gan.lora_attach import peft_config
from e2gan.model import Generator, build_generator
from e2gan.pairs import to_bytes, to_unit
from e2gan.stacked import StackedAdapters

Edit = Callable[[int], Tensor]
"""The step's number to the edited images."""


class Bench:
    """What the variants share: a base, its adapters with their prompts, and the images."""

    def __init__(self, args: argparse.Namespace, batch: int) -> None:
        self.device, self.batch, self.count = args.device, batch, args.adapters
        config = GeneratorConfig(channels=args.channels, init="normal")
        nine = replace(pix2pix_nine_blocks(), channels=args.channels)
        self.base = build_generator(config, seed=0).requires_grad_(False).eval()
        self.nine = build_generator(nine, seed=0).requires_grad_(False).eval()
        random = torch.Generator().manual_seed(0)
        shape = (batch, 3, args.side, args.side)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(args.device)
        self.texts = torch.randn(self.count, config.text_tokens, config.text_width, generator=random)
        empty = new_adapter(self.base, searched_ranks(self.base), seed=0)
        self.adapters = [
            Adapter(
                ranks=empty.ranks,
                scale=1.0,
                tensors={n: 0.02 * torch.randn(t.shape, generator=random) for n, t in empty.tensors.items()},
            )
            for _ in range(self.count)
        ]

    def switching(self, adapters: int, **options: Any) -> Edit:
        """One adapter a call, in turn."""
        switcher = Switcher(self.base, device=self.device, **options)
        merged = [switcher.merge(self.adapters[i], self.texts[i]) for i in range(adapters)]
        return lambda step: switcher(merged[step % adapters], self.images)

    def one_by_one(self, **options: Any) -> Edit:
        """A mixed batch as single images."""
        switcher = Switcher(self.base, device=self.device, **options)
        merged = [switcher.merge(self.adapters[i], self.texts[i]) for i in range(self.batch)]
        return lambda _: torch.cat([switcher(merged[i], self.images[i : i + 1]) for i in range(self.batch)])

    def stacked(self, **options: Any) -> Edit:
        stack = StackedAdapters(self.base, device=self.device, **options)
        for adapter, text in zip(self.adapters, self.texts, strict=True):
            stack.add(adapter, text)
        first = torch.arange(self.batch)
        return lambda step: stack(self.images, (first + step) % self.count)

    def peft_mixed(self, dtype: torch.dtype) -> Edit:
        """peft's `adapter_names`, with as many adapters loaded as the batch mixes."""
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        from e2gan.lora_transposed import LoraConvTranspose2d

        class Transposed(LoraConvTranspose2d):
            def forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
                return self._mixed_batch_forward(x, adapter_names=adapter_names)

        generator: Any = build_generator(self.base.config, seed=0).eval()
        names = [f"adapter{i}" for i in range(self.batch)]
        for name, adapter in zip(names, self.adapters[: self.batch], strict=True):
            config = peft_config(adapter)
            config._register_custom_module({nn.ConvTranspose2d: Transposed})
            inject_adapter_in_model(config, generator, adapter_name=name)
            for layer_name in adapter.ranks:
                layer = generator.get_submodule(layer_name)
                layer.lora_A[name].weight.data.copy_(adapter.tensors[f"{layer_name}.lora_A"])
                layer.lora_B[name].weight.data.copy_(adapter.tensors[f"{layer_name}.lora_B"])
        generator.requires_grad_(False).to(self.device, dtype).to(memory_format=torch.channels_last)
        for layer in generator.modules():
            if isinstance(layer, LoraLayer):
                layer.register_forward_pre_hook(
                    lambda _, given, named: (given, {**named, "adapter_names": names}), with_kwargs=True
                )
        texts = self.texts[: self.batch].to(self.device, dtype)
        unit = {"dtype": dtype, "memory_format": torch.channels_last}
        return lambda _: to_bytes(generator(to_unit(self.images).to(**unit), texts))

    def pix2pix(self) -> Edit:
        self.nine.to(self.device)
        return lambda _: to_bytes(self.nine(to_unit(self.images)))

    def onnx(self) -> Edit:
        """ONNX Runtime, one adapter's weights as constants."""
        import onnxruntime

        program = torch.onnx.export(self._merged(), (to_unit(self.images), self.texts[:1]), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=onnxruntime.get_available_providers()
        )
        names, text = [i.name for i in session.get_inputs()], self.texts[:1].numpy()

        def edit(_: int) -> Tensor:
            inputs = dict(zip(names, (to_unit(self.images).cpu().numpy(), text), strict=True))
            return to_bytes(torch.from_numpy(session.run(None, inputs)[0]))

        return edit

    def openvino(self, precision: str, adapters: int, *, rewrite: bool = False) -> Edit:
        """OpenVINO: one adapter's weights as constants, or many adapters' as inputs."""
        import openvino as ov

        images, text = to_unit(self.images), self.texts[:1]
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if adapters == 1:
            module: nn.Module = self._merged()
            module = fast_generator(module) if rewrite else module
            weights: list[list[Any]] = [[]]
        else:
            names = [f"{name}.weight" for name in crucial_layers(self.base)]
            module = _WeightsAsInputs(fast_generator(self.base) if rewrite else self.base, names)
            weights = []
            for adapter in self.adapters[:adapters]:
                merged = merge(self.base, adapter)
                weights.append([ov.Tensor(merged[name].contiguous().numpy()) for name in names])
        given = [torch.from_numpy(np.asarray(w.data)) for w in weights[0]]
        program = torch.export.export(module, (images, text, *given))
        model = ov.convert_model(program)
        model.reshape({i: list(t.shape) for i, t in enumerate((images, text, *given))})
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

        def edit(step: int) -> Tensor:
            n = step % adapters
            inputs = [to_unit(self.images).numpy(), self.texts[n : n + 1].numpy(), *weights[n]]
            return to_bytes(torch.from_numpy(request.infer(inputs, share_inputs=True)[0]))

        return edit

    def _merged(self) -> Generator:
        generator = build_generator(self.base.config, seed=0).requires_grad_(False).eval()
        generator.load_state_dict(merge(self.base, self.adapters[0]), strict=False)
        return generator


class _WeightsAsInputs(nn.Module):
    def __init__(self, generator: Generator, names: list[str]) -> None:
        super().__init__()
        self.generator, self.names = generator, names

    def forward(self, images: Tensor, text: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        out: Tensor = torch.func.functional_call(self.generator, named, (images, text))
        return out


def variants(bench: Bench) -> Iterator[tuple[str, int, Callable[[], Edit]]]:
    """Name, distinct adapters, and what prepares the variant; the first two are the references."""
    fp32: dict[str, Any] = {"dtype": torch.float32, "rewrite": False, "compile": False, "channels_last": False}
    bf16: dict[str, Any] = {**fp32, "dtype": torch.bfloat16, "channels_last": True}
    compiled: dict[str, Any] = {**bf16, "compile": True}
    cpu = bench.device == "cpu"
    many = bench.count
    fastest = {**compiled, "rewrite": cpu}
    rewritten = ", rewritten" if cpu else ""
    yield "pix2pix 9RB, eager fp32", 0, bench.pix2pix
    yield "eager fp32", 1, lambda: bench.switching(1, **fp32)
    yield "eager fp32, channels_last", 1, lambda: bench.switching(1, **{**fp32, "channels_last": True})
    yield "eager bf16, channels_last", 1, lambda: bench.switching(1, **bf16)
    yield "compiled bf16", 1, lambda: bench.switching(1, **compiled)
    if cpu:
        yield "compiled fp32, rewritten", 1, lambda: bench.switching(1, **{**fastest, "dtype": torch.float32})
        yield "compiled bf16, rewritten", 1, lambda: bench.switching(1, **fastest)
    yield f"compiled bf16{rewritten}", many, lambda: bench.switching(many, **fastest)
    yield "ONNX Runtime fp32", 1, bench.onnx
    if cpu:
        yield "OpenVINO fp32", 1, lambda: bench.openvino("f32", 1)
        yield "OpenVINO bf16", 1, lambda: bench.openvino("bf16", 1)
        yield "OpenVINO bf16, rewritten", 1, lambda: bench.openvino("bf16", 1, rewrite=True)
        yield "OpenVINO bf16, weights as inputs", many, lambda: bench.openvino("bf16", many)
    if bench.batch > 1:
        yield f"mixed batch, one by one, compiled bf16{rewritten}", bench.batch, lambda: bench.one_by_one(**fastest)
        yield "mixed batch, stacked, eager bf16", many, lambda: bench.stacked(dtype=torch.bfloat16)
        yield "mixed batch, stacked, compiled bf16", many, lambda: bench.stacked(dtype=torch.bfloat16, compile=True)
        yield "mixed batch, peft's adapter_names, eager fp32", bench.batch, lambda: bench.peft_mixed(torch.float32)
        yield "mixed batch, peft's adapter_names, eager bf16", bench.batch, lambda: bench.peft_mixed(torch.bfloat16)


NEEDS = {"ONNX Runtime": ("onnxruntime", "onnxscript"), "OpenVINO": ("openvino",)}


def missing(name: str) -> list[str]:
    """Packages that the variant needs and this machine lacks."""
    needed = [package for start, packages in NEEDS.items() if name.startswith(start) for package in packages]
    return [package for package in needed if importlib.util.find_spec(package) is None]


def seconds(edit: Edit, step: int, device: str) -> float:
    start = time.perf_counter()
    edit(step)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode(False)
@torch.no_grad()
def measure(args: argparse.Namespace, batch: int) -> None:
    torch._dynamo.reset()
    bench = Bench(args, batch)
    edits: dict[tuple[str, int], Edit] = {}
    differences: dict[tuple[str, int], float] = {}
    plain: dict[str, Any] = {"dtype": torch.float32, "compile": False, "rewrite": False}
    one_adapter, mixed = (edit(0).cpu().float() for edit in (bench.switching(1, **plain), bench.one_by_one(**plain)))
    for i, (name, adapters, prepare) in enumerate(variants(bench)):
        if i > 1 and args.only and not any(text in name for text in args.only):
            continue
        if lacking := missing(name):
            print(json.dumps({"variant": name, "skipped": f"{' and '.join(lacking)} not installed"}), flush=True)
            continue
        edit = edits[name, adapters] = prepare()
        edited = edit(0).cpu().float()
        edit(1)
        expected = mixed if name.startswith("mixed") else one_adapter
        differences[name, adapters] = round((edited - expected).abs().mean().item(), 2)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in edits}
    for step in range(args.repeats):
        for key, edit in edits.items():
            times[key].append(seconds(edit, step, args.device) / batch)
    reference = statistics.median(next(iter(times.values())))
    for (name, adapters), taken in times.items():
        line = {
            "variant": name,
            "batch": batch,
            "adapters": adapters,
            "seconds_per_image": round(statistics.median(taken), 5),
            "fastest": round(min(taken), 5),
            "ratio": round(statistics.median(taken) / reference, 3),
            "difference": None if adapters == 0 else differences[name, adapters],
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=260)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="variants whose names contain one of these, beside the references")
    parser.add_argument("--quick", action="store_true", help="a smoke test: small network, images and rotation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.quick:
        args.side, args.channels, args.adapters, args.batches, args.repeats = 64, 8, 3, [1, 2], 2
    print(json.dumps({"machine": machine(), "device": args.device, "side": args.side, "channels": args.channels}))
    for batch in args.batches:
        measure(args, batch)


if __name__ == "__main__":
    main()
