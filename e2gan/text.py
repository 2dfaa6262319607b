"""A concept's prompt as the text tokens of the cross-attention: float32 `[77, 768]` (E2GAN, section 4.2.1).

The paper's encoder is Stable Diffusion 1.5's, CLIP ViT-L/14. The embedded default needs no weights: it hashes
words. A concept's embedding is constant, so it is computed once and stored with the adapter; adapters and
their base must have used the same encoder, which is what an encoder's `name` is for.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKENS, WIDTH = 77, 768
"""Rows and columns of a text embedding."""


class TextEncoder(Protocol):
    """Turns a prompt into text tokens. The same prompt gives the same numbers, always."""

    @property
    def name(self) -> str:
        """What made the embedding, recorded beside it."""

    def __call__(self, prompt: str) -> Tensor:
        """The prompt as float32 `[77, 768]`, standard deviation about 1; a long prompt loses its end.

        Raises:
            ValueError: the prompt is empty.
        """

    def cut(self, prompt: str) -> str:
        """The end of the prompt that does not fit in 77 tokens and is left out; empty when all of it fits."""


class HashingTextEncoder:
    """The embedded encoder: every word is a fixed random vector, of its hash and its letters' n-grams.

    Row 0 is a start token, then one row a word in prompt order with a little of its position mixed in. As in
    CLIP, the remaining rows come from an end token that has seen the whole prompt: half is the end token's
    own vector, half the sum of the words. So prompts that share words have similar embeddings, as do words
    that share letters (`watercolor`, `watercolour`), and a change of words is felt in every row.

    All vectors come from SHAKE-256 by integer arithmetic: equal on every machine, process and hash seed.
    """

    name = "hashing-v1"

    def __call__(self, prompt: str) -> Tensor:
        """The prompt as float32 `[77, 768]`, standard deviation about 1.

        Raises:
            ValueError: the prompt has no word.
        """
        words = [_word_vector(word.group()) for word in _words(prompt)][: TOKENS - 2]
        end = _mix(_hash_vector("token:end"), sum(words, np.zeros(WIDTH)) / math.sqrt(len(words)), 0.5)
        rows = [_hash_vector("token:start"), *words] + [end] * (TOKENS - 1 - len(words))
        placed = [_mix(row, _hash_vector(f"position:{index}"), 0.1) for index, row in enumerate(rows)]
        return torch.from_numpy(np.stack(placed).astype(np.float32))

    def cut(self, prompt: str) -> str:
        """What comes after the 75th word; empty when the prompt has no more than that.

        Raises:
            ValueError: the prompt has no word.
        """
        words = _words(prompt)
        return _normalised(prompt)[words[TOKENS - 2].start() :].strip() if len(words) > TOKENS - 2 else ""


class ClipTextEncoder:
    """CLIP ViT-L/14's text model, its last hidden state, padded to 77 tokens as Stable Diffusion 1.5 does.

    Its name holds the digest of its weights.

    Args:
        path: a folder with the text model and its tokenizer, or a hub id such as
            `openai/clip-vit-large-patch14`.
        download: let transformers fetch a hub id that is not in its cache. Off, nothing touches the network.
        device: where the model runs; embeddings come back on the CPU.

    Raises:
        ValueError: transformers or the weights are not on this machine, or the model is not 77 tokens of
            width 768.
    """

    def __init__(self, path: str | Path, *, download: bool = False, device: str = "cpu") -> None:
        self._model = load_clip("CLIPTextModel", path, download=download)
        self._tokenizer = load_clip("CLIPTokenizer", path, download=download)
        self._device = device
        config = self._model.config
        if (config.max_position_embeddings, config.hidden_size) != (TOKENS, WIDTH):
            raise ValueError(
                f"the text model at {str(path)!r} gives {config.max_position_embeddings} tokens of width "
                f"{config.hidden_size}, the generator takes 77 of 768: use that of CLIP ViT-L/14"
            )
        if len(self._tokenizer) != config.vocab_size:
            # transformers makes up an empty tokenizer where its files are missing.
            raise ValueError(
                f"the tokenizer at {str(path)!r} has {len(self._tokenizer)} entries, the text model "
                f"{config.vocab_size}: put tokenizer.json, or vocab.json and merges.txt, there"
            )
        # Named by the weights, not by the folder, which may differ from machine to machine; half precision,
        # so that an fp16 copy has the same name.
        weights = hashlib.sha256()
        for parameter in self._model.parameters():
            weights.update(parameter.half().numpy().tobytes())
        self.name = f"clip-{weights.hexdigest()[:12]}"
        self._model.to(device)

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:
        """The prompt as float32 `[77, 768]`.

        Raises:
            ValueError: the prompt is empty.
        """
        _check_not_empty(prompt)
        tokens = self._tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        # Without an attention mask: Stable Diffusion 1.5 lets the padding rows look back at the prompt.
        hidden: Tensor = self._model(input_ids=tokens.input_ids.to(self._device)).last_hidden_state
        return hidden[0].float().cpu()

    def cut(self, prompt: str) -> str:
        """The end of the prompt past its 75th token; empty when all of it fits.

        Raises:
            ValueError: the prompt is empty.
        """
        _check_not_empty(prompt)
        tokens = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: list[tuple[int, int]] = tokens["offset_mapping"]
        return prompt[offsets[TOKENS - 2][0] :].strip() if len(offsets) > TOKENS - 2 else ""


def load_clip(part: str, path: str | Path, *, download: bool) -> Any:
    """Load one of transformers' CLIP classes, named by `part`, from a folder or the hub, in float32.

    Raises:
        ValueError: transformers is not installed, or the files are missing or are of another model.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError("CLIP needs transformers: pip install 'e2gan-farm[diffusion]'") from error
    kind = getattr(transformers, part)
    is_model = issubclass(kind, transformers.PreTrainedModel)
    extra = {"dtype": torch.float32, "output_loading_info": True} if is_model else {}
    try:
        loaded = kind.from_pretrained(str(path), local_files_only=not download, **extra)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no {part} at {str(path)!r}: give a folder that holds one, or a hub id fetched beforehand with "
            f"`hf download openai/clip-vit-large-patch14`"
        ) from error
    if not is_model:
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        # transformers only logs this and makes up random weights.
        raise ValueError(f"{str(path)!r} lacks weights of {part}, such as {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def _check_not_empty(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("the prompt is empty: give the concept some words")


def _normalised(prompt: str) -> str:
    return unicodedata.normalize("NFKC", prompt).lower()


def _words(prompt: str) -> list[re.Match[str]]:
    _check_not_empty(prompt)
    words = list(re.finditer(r"\w+", _normalised(prompt)))
    if not words:
        raise ValueError(f"the prompt {prompt!r} has no word: give the concept some words")
    return words


def _word_vector(word: str) -> NDArray[np.float64]:
    """Half the word's own vector, half that of its 3- and 4-letter pieces; standard deviation about 1."""
    framed = f"<{word}>"
    pieces = [framed[i : i + n] for n in (3, 4) for i in range(len(framed) - n + 1)]
    letters = sum((_hash_vector(f"piece:{piece}") for piece in pieces), np.zeros(WIDTH))
    return _mix(_hash_vector(f"word:{word}"), letters / math.sqrt(len(pieces)), 0.5)


def _mix(a: NDArray[np.float64], b: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Mix two independent vectors, keeping the standard deviation; `share` is b's part of the variance."""
    return math.sqrt(1 - share) * a + math.sqrt(share) * b


def _hash_vector(text: str) -> NDArray[np.float64]:
    """768 numbers uniform in -sqrt(3)..sqrt(3), so of standard deviation 1."""
    raw = np.frombuffer(hashlib.shake_256(text.encode()).digest(2 * WIDTH), dtype="<u2")
    return (raw.astype(np.float64) - 32767.5) * (math.sqrt(12) / 65536)
