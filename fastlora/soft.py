"""SoftPrompt: trainable virtual tokens, in front of the embeddings of a model's input (Lester et al. 2021)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapters
from fastlora.nearest import Neighbours, neighbours

MOST = 1024
"""Virtual tokens of one prompt, at the most."""


class SoftPrompt(nn.Module):
    """P virtual tokens: rows of the embedding space that no token has, learned while the model stays as it is.

    num_virtual_tokens: P, 1 to 1024.   embedding: the model's input embeddings, [V, d], which stay the model's own.
    init: "random", normal with the standard deviation of the vocabulary (PEFT's is 1, whatever the vocabulary's);
    "vocab", tokens drawn from it; "text", the tokens of `text` by `tokenizer`, repeated or cut to P.
    encoder_decoder: as PEFT, carry as many rows again for a decoder, which are saved with the encoder's and never read.

    `weight`: [P, d] is trained, in fp32 on 16-bit embeddings, else in their dtype.   Forward takes embeds: [B, S, d],
    returns [B, P + S, d] in their dtype. `fastlora.add_soft_prompt` puts it into a model, masks and positions with it.
    Raises ValueError, TypeError.
    """

    decoder_weight: Tensor | None

    def __init__(
        self,
        num_virtual_tokens: int,
        embedding: nn.Embedding,
        init: str = "random",
        *,
        text: str | None = None,
        tokenizer: Any = None,
        encoder_decoder: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(embedding, nn.Module) or getattr(embedding, "weight", torch.empty(0)).dim() != 2:
            raise TypeError(f"embedding: got {type(embedding).__name__}, wanted the model's input embeddings, [V, d]")
        P: Any = num_virtual_tokens
        if isinstance(P, bool) or not isinstance(P, int) or not 1 <= P <= MOST:
            raise ValueError(f"num_virtual_tokens: got {P!r}, wanted a whole number from 1 to {MOST}")
        self._embedding = (embedding,)  # in a tuple: no part of this module's parameters and state
        rows = _start(P * (2 if encoder_decoder else 1), embedding, init, text, tokenizer)
        self.weight = nn.Parameter(rows[:P].clone())
        self.register_buffer("decoder_weight", rows[P:].clone() if encoder_decoder else None)

    @property
    def embedding(self) -> nn.Embedding:
        """The model's input embeddings."""
        return self._embedding[0]

    def __len__(self) -> int:
        return len(self.weight)

    def forward(self, embeds: Tensor) -> Tensor:
        rows = self.weight.to(embeds.dtype)
        return torch.cat([rows.expand(len(embeds), -1, -1), embeds], 1)

    def nearest_tokens(self, k: int = 5, metric: str = "cosine", tokenizer: Any = None) -> Neighbours:
        """The k tokens of the vocabulary nearest to each virtual token, and how tight a cluster they are.

        metric: "cosine", "dot" or "euclidean".   tokenizer: names the tokens, if given.   Raises ValueError.
        """
        return neighbours(self.weight, self.embedding, k, metric, tokenizer)

    def save(self, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT's prompt tuning does, each at once.

        base_model: the name or folder of the model that it was trained on.   How the prompt began is not said: PEFT
        would begin so again, and look for the tokenizer.
        """
        seq2seq = self.decoder_weight is not None
        options = {
            "auto_mapping": None,
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "num_transformer_submodules": 2 if seq2seq else 1,
            "num_virtual_tokens": len(self),
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
            "token_dim": self.weight.shape[1],
        }
        rows = self.weight if self.decoder_weight is None else torch.cat([self.weight, self.decoder_weight])
        state = {"prompt_embeddings": rows.detach().cpu().contiguous()}
        adapters.save(Path(folder), options, state)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], embedding: nn.Embedding, *, encoder_decoder: bool = False
    ) -> SoftPrompt:
        """The prompt in a folder that `save` or PEFT's save_pretrained wrote, for a model of these embeddings.

        Raises FileNotFoundError, ValueError for what is no prompt tuning, does not fit, or is not finite.
        """
        prompt = cls(1, embedding, encoder_decoder=encoder_decoder)
        weight = prompt.weight
        target = adapters.Target({}, weight.dtype, (), (weight.shape[1], weight.dtype), encoder_decoder)
        found = adapters.read(folder, None, target, str(folder))
        if found.prompt is None or len(found.prompt) > MOST:
            what = "a LoRA adapter" if found.prompt is None else f"{len(found.prompt)} virtual tokens"
            raise ValueError(f"{folder}: got {what}, wanted a soft prompt of 1 to {MOST}")
        prompt.weight = nn.Parameter(found.prompt.to(weight.device))
        if encoder_decoder:  # PEFT may save none, and reads none: ours are saved by the same shapes either way
            rows = found.prompt if found.decoder_prompt is None else found.decoder_prompt
            prompt.decoder_weight = rows.to(weight.device, copy=True)
        return prompt

    def extra_repr(self) -> str:
        return f"{len(self)}, {self.weight.shape[1]}" + (", encoder_decoder" if self.decoder_weight is not None else "")


@torch.no_grad()
def _start(rows: int, embedding: nn.Embedding, init: str, text: str | None, tokenizer: Any) -> Tensor:
    """rows: [rows, d] to begin with.   Raises ValueError for an init that is none, or lacks its text."""
    vocabulary = embedding.weight
    device, dtype = vocabulary.device, torch.promote_types(vocabulary.dtype, torch.float32)
    if init == "random":
        return torch.randn(rows, vocabulary.shape[1], device=device, dtype=dtype) * vocabulary.to(dtype).std()
    if init == "vocab":
        ids = torch.randint(0, len(vocabulary), (rows,))
    elif init == "text":
        if not text or tokenizer is None:
            missing = "no tokenizer" if text else f"text={text!r}"
            raise ValueError(f"init: got 'text' with {missing}, wanted a text and the model's tokenizer")
        tokens = tokenizer(text)["input_ids"]
        if not tokens:
            raise ValueError(f"text: got {text!r}, of which the tokenizer makes no token")
        ids = torch.tensor((tokens * -(-rows // len(tokens)))[:rows])
    else:
        raise ValueError(f"init: got {init!r}, wanted 'random', 'vocab' or 'text'")
    return embedding(ids.to(device)).to(dtype)
