"""What a model makes of held-out dialogues: its loss on their summaries, the summaries it writes, and their ROUGE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer
from training import IGNORED, Collate, Row
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEASURES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BATCH = 32


@dataclass(frozen=True)
class Judge:
    """Held-out rows, their reference summaries, and the tokenizer that reads what a model writes."""

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    references: Sequence[str]

    def score(self, model: PreTrainedModel, written: Sequence[list[int]]) -> dict[str, float]:
        """The model's loss, and the mean F of ROUGE-1, 2, L and Lsum, stemmed, of what it has written."""
        each = self.rouge(self.read(written))
        return {"loss": self.loss(model), **{measure: sum(scores) / len(scores) for measure, scores in each.items()}}

    def rouge(self, summaries: Sequence[str]) -> dict[str, list[float]]:
        """F of each measure, stemmed, of each dialogue."""
        scorer = RougeScorer(MEASURES, use_stemmer=True)
        pairs = zip(self.references, summaries, strict=True)
        scores = [scorer.score(_lines(reference), _lines(summary)) for reference, summary in pairs]
        return {measure: [score[measure].fmeasure for score in scores] for measure in MEASURES}

    @torch.no_grad()
    def loss(self, model: PreTrainedModel) -> float:
        """Mean loss a summary token."""
        model.eval()
        collate, total, tokens = Collate(self.tokenizer.pad_token_id), 0.0, 0
        for start in range(0, len(self.rows), BATCH):
            batch = {key: value.to(model.device) for key, value in collate(self.rows[start : start + BATCH]).items()}
            count = int((batch["labels"] != IGNORED).sum())
            total += float(model(**batch).loss) * count
            tokens += count
        return total / tokens

    @torch.no_grad()
    def write(self, model: PreTrainedModel) -> list[list[int]]:
        """The tokens that greedy decoding puts after each prompt, up to the length of the longest reference."""
        model.eval()
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        length = max(len(row["labels"]) - row["labels"].count(IGNORED) for row in self.rows)
        seq2seq, written = model.config.is_encoder_decoder, []
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            prompts = [row["input_ids"][: None if seq2seq else row["labels"].count(IGNORED)] for row in rows]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=eos,
            )
            for answer in tokens[:, 1 if seq2seq else width :].tolist():
                written.append(answer[: answer.index(eos)] if eos in answer else answer)
        return written

    def read(self, written: Sequence[list[int]]) -> list[str]:
        """The text of what was written."""
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]


def _lines(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum wants it."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text)
