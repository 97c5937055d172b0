"""A base that needs no download: a byte-level BPE of the run's own text, and a small Llama or T5, briefly pretrained.

LoRA adapts what a model knows, so this one is first trained in full, with no summary in sight: to answer questions
about generated dialogues, or, where a file of dialogues comes without questions, to predict their text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dialogues import Example
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from training import pair, row, train
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

Parts = list[tuple[str, bool]]


@dataclass(frozen=True)
class Size:
    """How big the base is."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    vocab: int = 2000


def build_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, in which a word is spelt alike within a line and at its start."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace("\n", "\n ")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size, limit: int) -> LlamaForCausalLM:
    """A Llama for `limit` positions, fresh from its config."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=limit,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def build_t5(tokenizer: PreTrainedTokenizerFast, size: Size) -> T5ForConditionalGeneration:
    """An encoder and a decoder of T5's second kind, each of two layers for the Llama's three: as many weights or so."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=size.hidden,
        d_kv=size.hidden // size.heads,
        d_ff=2 * size.hidden,
        num_layers=max(1, size.layers - 1),
        num_heads=size.heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def reading(example: Example) -> Parts:
    """(text, learnt or only read) parts: the answers to the dialogue's questions, or all of it if there are none."""
    if not example.asks:
        return [(example.dialogue, True)]
    asks = [((f" {question}", False), (f" {answer}", True)) for question, answer in example.asks]
    return [(f"{example.dialogue}\n\nQuestions:", False), *itertools.chain.from_iterable(asks)]


def make(
    path: str, examples: Sequence[Example], size: Size, *, steps: int, limit: int, seed: int, scratch: Path
) -> list[float]:
    """Save a pretrained Llama and its tokenizer at `path`, as `from_pretrained` wants them.   Returns the losses."""
    readings = [reading(example) for example in examples]
    return pretrain(path, examples, readings, size, steps=steps, limit=limit, seed=seed, scratch=scratch)


def pretrain(
    path: str,
    examples: Sequence[Example],
    readings: Sequence[Parts],
    size: Size,
    *,
    seq2seq: bool = False,
    steps: int,
    limit: int,
    seed: int,
    scratch: Path,
) -> list[float]:
    """The same of the readings, and a T5 where seq2seq is asked for."""
    # the tokenizer may see prompts and summaries, for their words need spellings; the model may not
    texts = [text for example in examples for text in (example.prompt, f" {example.summary}")]
    texts += [text for parts in readings for text, _ in parts]
    tokenizer = build_tokenizer(texts, size.vocab)
    set_seed(seed)  # the weights it starts from are the seed's too
    model = build_t5(tokenizer, size) if seq2seq else build_model(tokenizer, size, limit)
    losses = train(
        model,
        [(pair if seq2seq else row)(tokenizer, parts, limit) for parts in readings],
        pad=tokenizer.pad_token_id,
        steps=steps,
        batch=8,
        lr=1.5e-3,
        seed=seed,
        scratch=scratch,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return losses
