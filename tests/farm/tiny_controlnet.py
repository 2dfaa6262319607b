"""Tiny folders of what ControlNet has beside Stable Diffusion: the ControlNet itself and a depth network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_diffusers import UNET

DEPTH_SIDE = 64
"""The tiny depth network sees photos squeezed into a square of this side, as DPT-hybrid does into one of 384."""


def control_net(folder: Path, *, seed: int = 5, **options: Any) -> Path:
    """Save a ControlNetModel that fits `tiny_diffusers.unet` and has been trained: its outputs are not all zero."""
    import torch
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    model = ControlNetModel(conditioning_embedding_out_channels=(8, 8, 16, 16), **{**UNET, **options})
    for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.3)
    embedding = model.controlnet_cond_embedding
    for layer in [embedding.conv_in, *embedding.blocks, embedding.conv_out]:
        torch.nn.init.kaiming_normal_(layer.weight)
    embedding.conv_out.weight.data *= 30  # so that the map shows in an edit
    model.save_pretrained(folder)
    return folder


def depth_network(folder: Path, *, seed: int = 6) -> Path:
    """Save a DPTForDepthEstimation and its image processor; as Intel/dpt-hybrid-midas it is a BiT under a ViT."""
    import torch
    from transformers import BitConfig, DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(seed)
    bit = BitConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_groups=4,
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=bit,
        backbone_featmap_shape=(1, 24, 4, 4),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=DEPTH_SIDE,
        backbone_out_indices=(0, 1, 2, 3),
        neck_hidden_sizes=(8, 16, 24, 24),
        fusion_hidden_size=8,
        initializer_range=0.15,  # so that depth is not the same everywhere
    )
    model = DPTForDepthEstimation(config)
    # Published ones are without what the class has and never uses.
    unused = "neck.fusion_stage.layers.0.residual_layer1."
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(unused)}
    model.save_pretrained(folder, state_dict=state)
    DPTImageProcessor(
        size={"height": DEPTH_SIDE, "width": DEPTH_SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    return folder
