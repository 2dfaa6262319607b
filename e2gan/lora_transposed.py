"""LoRA on a transposed convolution, the layer peft lacks (docs/method.md). Imported by `e2gan.lora` when needed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class LoraConvTranspose2d(nn.Module, LoraLayer):
    """A: a transposed convolution to r channels with the base's geometry; B: a 1x1 convolution to its channels."""

    def __init__(
        self,
        base_layer: nn.ConvTranspose2d,
        adapter_name: str,
        config: Any,
        r: int,
        lora_alpha: float,
        **_: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **_: Any) -> None:
        base: Any = self.get_base_layer()
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_bias[adapter_name] = self.use_dora[adapter_name] = self.use_rslora[adapter_name] = False
        self.lora_A[adapter_name] = nn.ConvTranspose2d(
            base.in_channels, r, base.kernel_size, base.stride, base.padding, base.output_padding, bias=False
        )
        self.lora_B[adapter_name] = nn.Conv2d(r, base.out_channels, 1, bias=False)
        self.reset_lora_parameters(adapter_name, init_lora_weights=True)  # type: ignore[no-untyped-call]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.ConvTranspose2d)
        return module.in_channels, module.out_channels

    def get_delta_weight(self, adapter: str) -> Tensor:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight  # [in, r, k, k], [out, r, 1, 1]
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        delta: Tensor = torch.einsum("irkl,or->iokl", a, b[:, :, 0, 0]) * self.scaling[adapter]
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in adapter_names or self.active_adapters:
            self._base_weight().data += self.get_delta_weight(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._base_weight().data -= self.get_delta_weight(self.merged_adapters.pop())

    def _base_weight(self) -> Tensor:
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result
