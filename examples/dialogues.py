"""A seeded generator of everyday dialogues, their summaries, and questions about them.

A dialogue is a scene of `scenes.txt` that ends in one of several ways. Its sentences are drawn from alternatives, its
names, places, days and prices from pools; small talk brings in facts that do not matter. The summary states what
matters and how the scene ended, so it must be picked out of the dialogue.

`python examples/dialogues.py --seed 57 --count 1` prints

    Anna: I ran all the way from the park, Ingrid.
    Ingrid: Do not worry, I have been reading since six.
    Anna: Would you come to the film festival with me on Friday?
    Ingrid: Where do we meet, and when?
    Anna: Let us meet by the market at two.
    Ingrid: I just see that I play tennis on Friday. Would Sunday work?
    Anna: Good, let us make it Sunday.

    -> Anna invites Ingrid to the film festival. They move it from Friday to Sunday and will meet at the market at two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A dialogue, its reference summary, (question, answer) pairs on its facts, for a base to learn, and its topic."""

    dialogue: str
    summary: str
    asks: tuple[tuple[str, str], ...] = ()
    topic: str = ""

    @property
    def prompt(self) -> str:
        """What a model is asked; the summary is the answer."""
        return f"Summarize the following conversation.\n\n{self.dialogue}\n\nSummary:"


@dataclass
class Script:
    """Turns with the ways to say each, the summary that is true after them, questions and answers."""

    turns: list[tuple[str, list[str]]] = field(default_factory=list)
    summary: str = ""
    asks: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: Script) -> Script:
        return Script(self.turns + other.turns, other.summary, self.asks + other.asks)


@dataclass
class Scene:
    """A title, what the second speaker is called, where that is not a name, an opening and the ways it may end."""

    title: str
    role: str
    opening: Script
    endings: list[Script]


def _script(text: str) -> Script:
    script = Script()
    for line in text.strip("\n").splitlines():
        key, rest = line[:2], line[2:].strip()
        if key in ("a:", "b:"):
            script.turns.append((key[0], [rest]))
        elif key == "? ":
            question, _, answer = rest.partition(" = ")
            script.asks.append((question, answer))
        elif key == "= ":
            script.summary = rest
        else:
            script.turns[-1][1].append(rest)
    return script


def _load(path: Path) -> tuple[dict[str, list[str]], list[Script], list[Scene]]:
    """The pools, the small talk and the scenes of a file."""
    pools: dict[str, list[str]] = {}
    talk: list[Script] = []
    scenes: list[Scene] = []
    for title, role, body in re.findall(r"^\[(.+)\] ?@?(\w*)\n((?:(?!\[).*\n)+)", path.read_text("utf-8"), re.M):
        if title == "pools":
            for key, values in re.findall(r"^(\w+): (.+)$", body, re.M):
                pools.setdefault(key, []).extend(values.split(", "))
        elif title == "small talk":
            talk = [_script(part) for part in body.strip().split("\n\n")]
        else:
            opening, *endings = (_script(part) for part in body.split("--\n"))
            scenes.append(Scene(title, role, opening, endings))
    return pools, talk, scenes


POOLS, SMALL_TALK, SCENES = _load(Path(__file__).with_name("scenes.txt"))


def play(scene: Scene, ending: Script, rng: random.Random) -> Example:
    """One way to act a scene to one of its endings."""
    values: dict[str, str] = {}

    def draw(slot: str) -> None:
        if slot not in values:
            values[slot] = rng.choice([v for v in POOLS[slot.rstrip("0123456789")] if v not in values.values()])

    def fill(text: str) -> str:
        return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text.format(**values))

    for speaker, slot in (("a", "name1"), ("b", "name2")):
        draw(slot)
        values[speaker] = values[slot]
    script = scene.opening + ending
    if scene.role:
        values["b"] = scene.role
    elif rng.random() < 0.6:
        script = rng.choice(SMALL_TALK) + script
    turns = []
    for speaker, ways in script.turns:
        text = rng.choice(ways)
        for slot in re.findall(r"{(\w+)}", text):
            draw(slot)
        turns.append(f"{values[speaker]}: {fill(text)}")
    asks = tuple((fill(question), fill(answer)) for question, answer in script.asks)
    return Example("\n".join(turns), fill(script.summary), asks, scene.title)


def dialogues(seed: int) -> Iterator[Example]:
    """Examples without end, no two with the same summary: what is held out has a summary that was never trained on."""
    rng = random.Random(seed)
    told: set[str] = set()
    while True:
        scene = rng.choice(SCENES)
        example = play(scene, rng.choice(scene.endings), rng)
        if example.summary not in told:
            told.add(example.summary)
            yield example


def read(path: Path) -> list[Example]:
    """The dialogues of a file of JSON lines with `dialogue` and `summary` (or `summary1`), and `topic` if there is one.

    Raises ValueError, which names the file and the row, counted from 1 as an editor does.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: got no JSON: {error}") from error
        got = fields if isinstance(fields, dict) else {}
        texts = [got.get("dialogue"), got.get("summary", got.get("summary1"))]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            said = ", ".join(got) or type(fields).__name__
            raise ValueError(f"{path}, row {number}: got {said}, wanted texts `dialogue` and `summary`")
        dialogue, summary = (text.replace("\r\n", "\n").strip() for text in texts)
        found.append(Example(dialogue, summary, topic=str(got.get("topic", got.get("topic1", ""))).strip()))
    if not found:
        raise ValueError(f"{path}: got an empty file, wanted a dialogue a line")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="print a few dialogues, each with its summary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    args = parser.parse_args()
    for example in itertools.islice(dialogues(args.seed), args.count):
        print(f"{example.dialogue}\n\n-> {example.summary}\n")


if __name__ == "__main__":
    main()
