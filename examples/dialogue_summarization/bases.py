"""The base models of a run, pretrained in it: what they read, and nothing of what they will be asked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from dialogues import Example
from tasks import TASKS
from tinybase import Parts, reading

ORDERS = {
    "speakers": "Name the speakers of the following conversation.",
    "last-line": "Repeat the last line of the following conversation.",
}
"""Tasks that a base knows, put to it as summarizing will be."""


def asked(order: str, example: Example, cue: str) -> str:
    """A prompt in the words of `Example.prompt`."""
    return f"{order}\n\n{example.dialogue}\n\n{cue}:"


def shots(parts: Sequence[Parts]) -> Parts:
    """Examples one after another, as few-shot prompts have them."""
    return [
        (text if i or not n else f"\n\n{text}", learnt)
        for n, p in enumerate(parts)
        for i, (text, learnt) in enumerate(p)
    ]


def readings(examples: Sequence[Example], seed: int) -> list[Parts]:
    """What a base is pretrained on: questions, orders, at times three in a row; of a mere text, its second part."""
    rng = random.Random(seed)
    return [shots(list(_several(example, examples, rng))) for example in examples]


def _several(example: Example, examples: Sequence[Example], rng: random.Random) -> Iterator[Parts]:
    if not example.asks:
        lines = example.dialogue.splitlines(keepends=True)
        cut = rng.randrange(1, len(lines)) if len(lines) > 1 else 0
        yield [("".join(lines[:cut]), False), ("".join(lines[cut:]), True)]
        return
    order = rng.choice([None, None, *ORDERS])
    count = 3 if rng.random() < 0.15 else 1
    for each in [*rng.sample(examples, count - 1), example]:
        if order is None:
            yield reading(each)
        else:
            task = next(task for task in TASKS if task.name == order)
            yield [(asked(ORDERS[order], each, "Answer"), False), (f" {task.answer(each)}", True)]
