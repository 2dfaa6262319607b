"""A published concept as an ExecuTorch program for Android (XNNPACK, float32), run and held against the server's edit.

    python -m venv et && et/bin/pip install -e . executorch
    et/bin/python examples/android/export_executorch.py --config configs/demo.yaml --concept night --out night.pte

In an environment of its own: executorch wants other versions of some packages than constraints.txt has. Input and
output are one float32 tensor `[1, 3, side, side]` of 0..255. Every program holds the whole base (docs/phones.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

from e2gan.export.parity import parity, server_edits
from e2gan.export.phone import PhoneGenerator, concept_tensors
from e2gan.infer import base_generator
from e2gan.pairs import to_tensor
from farm.config_file import load_config
from farm.plan import make_plan
from farm.registry import Registry
from farm.stages.ingest import source_images
from farm.store import open_store
from farm.weights import read_adapter, read_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--concept", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    config = load_config(args.config, args.set)
    store = open_store(config.store)
    entry = Registry(store).get(args.concept)
    if entry is None:
        parser.error(f"--concept: {args.concept} is not published in {store.url}")
    base = base_generator(*read_base(store, f"bases/{entry.base}"))
    adapter, text = read_adapter(store, entry.adapter, entry.base, base.config)
    images = source_images(store, make_plan(config).sources.path)
    photo = to_tensor([np.asarray(images[min(images)])])

    network = PhoneGenerator(base, concept_tensors(base, adapter, text)).eval()
    program = torch.export.export(network, (photo.float(),))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    args.out.write_bytes(lowered.buffer)

    method = Runtime.get().load_program(str(args.out)).load_method("forward")
    edited = method.execute([photo.float()])[0].clamp(0, 255).to(torch.uint8)
    found = parity(server_edits(base, adapter, text, photo), edited)
    print(f"{args.out}: {len(lowered.buffer) / 1e6:.2f} MB, {found.lowest:.1f} dB PSNR to the server's edit")


if __name__ == "__main__":
    main()
