"""Questions whose answers stand somewhere in a long context, made from seeded text (in the manner of RULER,
Hsieh et al. 2024), and last words of passages (in the manner of LAMBADA, Paperno et al. 2016)."""
from __future__ import annotations

import dataclasses
import random
import re
from typing import Sequence

from quality.model import Model


@dataclasses.dataclass(frozen=True)
class Question:
    """Tokens that follow the context; the last `answer` of them are what has to be said."""

    ids: list[int]
    answer: int


@dataclasses.dataclass(frozen=True)
class Context:
    ids: list[int]
    questions: list[Question]


def needles(model: Model, haystack: Sequence[str], words: Sequence[str], tokens: int, questions: int,
            rng: random.Random) -> Context:
    """Multi-key needle: as many sentences with a key and a number as questions; each asks for one key."""
    keys = rng.sample(words, questions)
    facts = {key: f"{rng.randrange(10000, 100000)}" for key in keys}
    inserted = [f"One of the special magic numbers for {key} is: {value}." for key, value in facts.items()]
    asked = [(f"\nQuestion: What is the special magic number for {key}?\nAnswer: The special magic number for {key} is:",
              f" {facts[key]}") for key in keys]
    return _context(model, haystack, inserted, asked, tokens, rng)


def variables(model: Model, haystack: Sequence[str], words: Sequence[str], tokens: int, questions: int,
              rng: random.Random) -> Context:
    """Variable tracking: chains x = number, y = x; each question asks for the number behind a y."""
    names = [word.upper() for word in rng.sample(words, 2 * questions)]
    inserted, asked = [], []
    for first, second in zip(names[::2], names[1::2]):
        value = rng.randrange(10000, 100000)
        inserted.append(f"VAR {first} = {value}. VAR {second} = VAR {first}.")
        asked.append((f"\nQuestion: What is the value of VAR {second}?\nAnswer: VAR {second} = VAR {first} =",
                      f" {value}"))
    return _context(model, haystack, inserted, asked, tokens, rng)


TASKS = {"needles": needles, "variables": variables}


def _context(model: Model, haystack: Sequence[str], inserted: Sequence[str], asked: Sequence[tuple[str, str]],
             tokens: int, rng: random.Random) -> Context:
    """Sentences of the haystack from a random place on, the inserted ones spread among them at random."""
    budget = tokens - sum(len(model.tokens(" " + sentence)) for sentence in inserted)
    start = rng.randrange(len(haystack))
    sentences, used = [], 0
    while True:
        sentence = haystack[(start + len(sentences)) % len(haystack)]
        used += len(model.tokens(" " + sentence))
        if used > budget:
            break
        sentences.append(sentence)
    for sentence in inserted:
        sentences.insert(rng.randrange(len(sentences) + 1), sentence)
    questions = []
    for prompt, answer in asked:
        prompt_ids, answer_ids = model.tokens(prompt), model.tokens(answer)
        questions.append(Question(prompt_ids + answer_ids, len(answer_ids)))
    return Context(model.tokens(" ".join(sentences)), questions)


def sentences_of(text: str) -> list[str]:
    """Sentences of 40 to 400 characters, one line each."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [sentence for sentence in found if 40 <= len(sentence) <= 400]


def words_of(text: str) -> list[str]:
    """Distinct lower-case words of 5 to 9 letters, in the order of the alphabet."""
    return sorted(set(re.findall(r"\b[a-z]{5,9}\b", text)))


def last_words(text: str) -> list[tuple[int, int]]:
    """Character spans [begin, end) of the last word (4 letters or more) of every sentence or line."""
    return [match.span(1) for match in re.finditer(r"\b([A-Za-z]{4,})(?=[.!?]+(?:\s|$)|\s*\n|\s*$)", text)]
