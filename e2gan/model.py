"""The E2GAN generator and its discriminator.

Paper: Gong et al., "E2GAN: Efficient Training of Efficient GANs for Image-to-Image Translation", ICML 2024,
section 4.2.1. The ResNet generator and the 70x70 PatchGAN are pix2pix's (Isola et al., CVPR 2017). Written anew,
Apache-2.0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2gan.config import GeneratorConfig, Part
from e2gan.weights import Shapes


class Generator(nn.Module):
    """Photo and prompt to edited photo.

    forward(images, text): images `[n, 3, h, w]` in -1..1, h and w multiples of 8 and at least 16; text `[n, 77, 768]`,
    or `[1, 77, 768]` for one prompt over the batch, ignored without cross-attention. Returns `[n, 3, h, w]` in
    -1..1.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.stem = nn.Conv2d(3, c, 7)
        self.down1 = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1)
        self.residual = nn.ModuleList(ResidualBlock(4 * c) for _ in range(config.residual_blocks))
        self.transformer = nn.ModuleList(TransformerBlock(config) for _ in range(config.transformer_blocks))
        self.up1 = nn.ConvTranspose2d(4 * c, 2 * c, 3, stride=2, padding=1, output_padding=1)
        self.up2 = nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Conv2d(c, 3, 7)
        # A module of its own, never padding_mode="reflect": peft's convolution branches would not pad.
        self.pad = nn.ReflectionPad2d(3)

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        x = F.relu(F.instance_norm(self.stem(self.pad(images))))  # [n, c, h, w]
        x = F.relu(F.instance_norm(self.down1(x)))  # [n, 2c, h/2, w/2]
        x = F.relu(F.instance_norm(self.down2(x)))  # [n, 4c, h/4, w/4]
        for i in range(len(self.residual) + 1):
            if i == self.config.transformer_position:
                for transformer in self.transformer:
                    x = transformer(x, text)
            if i < len(self.residual):
                x = self.residual[i](x)
        x = F.relu(F.instance_norm(self.up1(x)))  # [n, 2c, h/2, w/2]
        x = F.relu(F.instance_norm(self.up2(x)))  # [n, c, h, w]
        return torch.tanh(self.head(self.pad(x)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a skip: `[n, c, h, w]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.instance_norm(self.conv1(self.pad(x))))
        out: Tensor = x + F.instance_norm(self.conv2(self.pad(y)))
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt and a GEGLU feed-forward at half the resolution, with a skip.

    The paper does not say whether the block has a skip. Without one every detail must pass an eighth of the image's
    side, where the channels are fewer than the pixels they stand for, and the output is blurred.

    `[n, c, h, w]` and text `[n, tokens, text_width]` to `[n, c, h, w]`.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        channels = 4 * config.channels
        conv = config.transformer_sampling == "conv"
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, config.heads)
        if config.cross_attention:
            self.norm2 = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, config.text_width, config.heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.up = (
            nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)
            if conv
            else nn.Upsample(scale_factor=2)
        )
        self.attends_to_text = config.cross_attention

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        y = F.relu(F.instance_norm(self.down(x)))
        n, c, h, w = y.shape
        tokens = y.flatten(2).transpose(1, 2)  # [n, h*w, c]
        y = self.norm1(tokens)
        tokens = tokens + self.self_attention(y, y)
        if self.attends_to_text:
            assert text is not None, "cross-attention needs the prompt's embedding"
            tokens = tokens + self.cross_attention(self.norm2(tokens), text.expand(n, -1, -1))
        tokens = tokens + self.feed_forward(self.norm3(tokens))
        y = tokens.transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = x + F.instance_norm(self.up(y))
        return out


class Attention(nn.Module):
    """Multi-head attention of `[n, queries, c]` over `[n, keys, context]`."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(context, channels, bias=False)
        self.v = nn.Linear(context, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # [n, length, c] to [n, heads, length, c/heads]
            n, length, c = t.shape
            return t.view(n, length, self.heads, c // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(context)), split(self.v(context)))
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2020): `[n, length, c]` through 4c and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = self.out(value * F.gelu(gate))
        return out


class Discriminator(nn.Module):
    """70x70 PatchGAN over source and target together (Isola et al., 2017, section 3.2.2).

    forward(source, target): both `[n, 3, h, w]` in -1..1, h and w at least 24. Returns one logit a patch,
    `[n, 1, h/8 - 2, w/8 - 2]`.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        c = channels
        self.layers = nn.Sequential(
            nn.Conv2d(6, c, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1),
            nn.InstanceNorm2d(2 * c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * c, 4 * c, 4, stride=2, padding=1),
            nn.InstanceNorm2d(4 * c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * c, 8 * c, 4, padding=1),
            nn.InstanceNorm2d(8 * c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8 * c, 1, 4, padding=1),
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = self.layers(torch.cat([source, target], dim=1))
        return logits


def part_of(name: str) -> Part:
    """The part that a module or a parameter of a generator belongs to, by its name."""
    first = name.partition(".")[0]
    return first if first in ("transformer", "residual") else "sampling"  # type: ignore[return-value]


@lru_cache(maxsize=8)
def blueprint(config: GeneratorConfig) -> Generator:
    """A generator without weights, to look shapes up in: it takes no memory and cannot run. Not to be changed."""
    with torch.device("meta"):
        return Generator(config)


def generator_shapes(config: GeneratorConfig) -> Shapes:
    """The shape of every weight of a generator, by its name in `state_dict`."""
    return {name: tuple(weight.shape) for name, weight in blueprint(config).state_dict().items()}


def build_generator(config: GeneratorConfig, *, seed: int) -> Generator:
    """A generator with fresh weights that depend on config and seed alone, never on global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(config)
        generator.apply(_init_convolution)
        if config.init == "identity":
            _init_identity(generator)
    return generator


def build_discriminator(channels: int, *, seed: int) -> Discriminator:
    """A discriminator with fresh weights, seeded like `build_generator`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(channels)
        discriminator.apply(_init_convolution)
    return discriminator


def _init_convolution(module: nn.Module) -> None:
    """pix2pix's N(0, 0.02) for convolutions; linear layers keep PyTorch's default."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _init_identity(generator: Generator) -> None:
    """Make the fresh generator pass the photo on, but for the exposure that instance norm takes away.

    From N(0, 0.02) most of a short training goes into carrying detail through the bottleneck at a quarter of the side.
    Here a few channels carry it from the start: every signal in a pair of channels with opposite signs, of which the
    rectifiers leave one, and every strided convolution turns a signal into the four of its 2x2 pixels, as pixel
    unshuffle does. The blocks in between start silent (but a transformer block that only pools, which has no weight to
    silence it by). Narrow networks carry what fits.
    """
    colours = min(3, generator.stem.out_channels // 2)
    quarters = min(4 * colours, generator.down1.out_channels // 2)  # signals at half the side
    sixteenths = min(4 * quarters, generator.down2.out_channels // 2)  # signals at a quarter of the side

    generator.stem.weight[: 2 * colours] = 0
    generator.head.weight.mul_(0.1)
    generator.head.weight[:, : 2 * colours] = 0
    for c in range(colours):
        generator.stem.weight[2 * c, c, 3, 3], generator.stem.weight[2 * c + 1, c, 3, 3] = 1, -1
        # Instance norm leaves a standard deviation of 1; photos in -1..1 have about 0.5.
        generator.head.weight[c, 2 * c, 3, 3], generator.head.weight[c, 2 * c + 1, 3, 3] = 0.5, -0.5
    for down, signals in ((generator.down1, quarters), (generator.down2, sixteenths)):
        down.weight[: 2 * signals] = 0
        for signal in range(signals):
            _pass_on(down.weight, out=signal, into=signal // 4, pixel=signal % 4)
    for up, signals, merged in ((generator.up1, sixteenths, quarters), (generator.up2, quarters, colours)):
        weight = up.weight.transpose(0, 1)  # a view, [out, in, k, k]
        weight[: 2 * merged] = 0
        for signal in range(signals):
            _pass_on(weight, out=signal // 4, into=signal, pixel=signal % 4)
    for module in generator.modules():
        # Below instance norm's epsilon, or the norm would bring the silent branch back to full strength.
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(1e-4)
        if isinstance(module, TransformerBlock) and isinstance(module.up, nn.ConvTranspose2d):
            module.up.weight.mul_(1e-4)


def _pass_on(weight: Tensor, *, out: int, into: int, pixel: int) -> None:
    """Carry a signal (a pair of channels) on through one of the 2x2 pixels that a 3x3 kernel of stride 2 sees."""
    row, column = 1 + pixel // 2, 1 + pixel % 2
    weight[2 * out : 2 * out + 2, 2 * into : 2 * into + 2, row, column] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
