"""What CLIP sees in an edit: whether it went where the prompt pointed, and how much of the photo is left."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from e2gan.pairs import Image


SAME = 1e-5
"""Unit vectors closer than this are one and the same: they differ by rounding, which has no direction."""


class ClipJudge:
    """CLIP's image and text encoders, such as those of `openai/clip-vit-large-patch14`.

    Args:
        path: a folder with a whole CLIP model and its tokenizer, or a hub id in transformers' cache.
        device: where the model runs.

    Raises:
        UserError: transformers or the weights are not on this machine, or are not of such a model.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu") -> None:
        from e2gan.embeddings import ClipImageEmbedding
        from e2gan.text import load_clip

        try:
            self._images = ClipImageEmbedding(path, device=device)
            self._texts = load_clip("CLIPTextModelWithProjection", path, download=False).to(device)
            self._tokenizer = load_clip("CLIPTokenizer", path, download=False)
        except ValueError as error:
            raise UserError(f"quality.clip: {error}.") from error
        entries = self._texts.config.vocab_size
        if len(self._tokenizer) != entries:
            # transformers makes up an empty tokenizer where its files are missing.
            raise UserError(
                f"quality.clip: the tokenizer at {str(path)!r} has {len(self._tokenizer)} entries, the text model "
                f"{entries}; put tokenizer.json, or vocab.json and merges.txt, there."
            )
        self._device = device
        self._image = lru_cache(maxsize=8)(self._embed_image)  # a pair is looked at twice
        self._delta = lru_cache(maxsize=8)(self._embed_delta)  # and a concept has one prompt

    def direction(self, source: Image, edit: Image, before: str, after: str) -> float:
        """Cosine, -1..1, of what changed between two images and what changed between their captions.

        The directional CLIP similarity of StyleGAN-NADA (Gal et al., SIGGRAPH 2022, section 4.2), by which
        InstructPix2Pix chose its training pairs (Brooks et al., CVPR 2023, section 3.1.2). 0 where nothing changed.

        Args:
            source, edit: uint8 `[h, w, 3]`.
            before, after: captions of the two; what does not fit in the text model is cut.
        """
        from torch.nn.functional import cosine_similarity

        change = self._image(edit.tobytes(), edit.shape) - self._image(source.tobytes(), source.shape)
        delta = self._delta(before, after)
        if min(change.norm(), delta.norm()) < SAME:
            return 0.0
        return float(cosine_similarity(change, delta, dim=0))

    def similarity(self, source: Image, edit: Image) -> float:
        """Cosine, -1..1, of the embeddings of two images, uint8 `[h, w, 3]`."""
        return float(self._image(source.tobytes(), source.shape) @ self._image(edit.tobytes(), edit.shape))

    def _embed_image(self, pixels: bytes, shape: tuple[int, ...]) -> Tensor:
        import torch

        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, *shape).permute(0, 3, 1, 2)
        return torch.from_numpy(self._images(image)[0])

    def _embed_delta(self, before: str, after: str) -> Tensor:
        import torch

        tokens: Any = self._tokenizer(
            [before, after],
            padding=True,
            truncation=True,
            max_length=self._texts.config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        with torch.no_grad():
            embeds: Tensor = self._texts(**tokens).text_embeds.double().cpu()
        unit = embeds / embeds.norm(dim=1, keepdim=True)
        delta: Tensor = unit[1] - unit[0]
        return delta
