"""What is measured of a model, dialogue by dialogue: loss, ROUGE, and the counts that BLEU is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from judge import BATCH, Judge
from sacrebleu.metrics import BLEU
from torch.nn import functional as F
from training import IGNORED, Collate, Row


def written(judge: Judge, model: Any) -> list[str]:
    """The summaries that a model writes; what comes after an empty line is no longer one."""
    return [text.split("\n\n")[0].strip() for text in judge.read(judge.write(model))]


def scores(judge: Judge, summaries: Sequence[str]) -> dict[str, list[Any]]:
    """Of each dialogue: ROUGE's F by measure, and for BLEU [n-grams in common, in all (4 each), length, reference's]"""
    metric = BLEU(effective_order=True)  # sentences by themselves: says nothing of the counts
    bleu = []
    for summary, reference in zip(summaries, judge.references, strict=True):
        found = metric.sentence_score(summary, [reference])
        bleu.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    rouge = {measure: [round(value, 4) for value in values] for measure, values in judge.rouge(summaries).items()}
    return {**rouge, "bleu": bleu}


@torch.no_grad()
def losses(model: Any, rows: Sequence[Row], pad: int) -> list[tuple[float, int, int]]:
    """(summed loss, tokens, tokens that were the likeliest) of the labels of each row."""
    model.eval()
    collate, seq2seq, found = Collate(pad), model.config.is_encoder_decoder, []
    for start in range(0, len(rows), BATCH):
        batch = {key: value.to(model.device) for key, value in collate(rows[start : start + BATCH]).items()}
        labels = batch["labels"]
        logits = model(**batch).logits[:, -labels.shape[1] :].float()  # virtual tokens come before
        if not seq2seq:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        learnt = labels != IGNORED
        right = (logits.argmax(-1) == labels) & learnt
        found += zip(each.sum(1).tolist(), learnt.sum(1).tolist(), right.sum(1).tolist(), strict=True)
    return [(round(loss, 4), tokens, right) for loss, tokens, right in found]
