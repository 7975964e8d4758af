"""Retrieval and last-word tasks: the context is cached, each question decodes over it, trials are paired."""
from __future__ import annotations

import dataclasses
import random
import sys
from typing import Sequence

import numpy as np
import torch

import adaattn
from quality import tasks
from quality.arms import Arm
from quality.mixture import Mixture
from quality.model import ExactOverPrefill, Model, Prefill
from quality.served import BytesRead, Lane
from quality.statistics import Interval, block_bootstrap, mcnemar


@dataclasses.dataclass
class TaskResult:
    """One arm on one task. Intervals: 95 %, bootstrap over contexts, whose questions are not independent."""

    task: str
    arm: str
    trials: int
    accuracy: float
    difference: Interval   # of accuracy, arm - exact
    only_exact: int        # right with exact attention, wrong with the arm
    only_arm: int
    p_value: float         # McNemar, exact, two-sided
    bytes_ratio: float     # of BF16's K and V bytes, metadata included


def run(client: adaattn.Client, model: Model, text: str, task: str, tokens: int, contexts: int, questions: int,
        arms: Sequence[Arm], seed: int = 0, quiet: bool = False) -> list[TaskResult]:
    """contexts x questions trials over contexts of about `tokens` tokens. The first result is exact.

    A trial is right when every token of the answer is the most probable one given the tokens before it, which
    is what greedy decoding would have said.
    """
    haystack, words = tasks.sentences_of(text), tasks.words_of(text)
    right = [[] for _ in range(1 + len(arms))]
    totals = [BytesRead() for _ in arms]
    for index in range(contexts):
        rng = random.Random(f"{seed} {task} {index}")
        context = tasks.TASKS[task](model, haystack, words, tokens, questions, rng)
        prefill = Prefill(len(context.ids))
        model.hidden(torch.tensor([context.ids]), 0, prefill)
        asked = context.questions
        ids = torch.zeros(len(asked), max(len(question.ids) for question in asked), dtype=torch.long)
        for row, question in enumerate(asked):
            ids[row, :len(question.ids)] = torch.tensor(question.ids)
        lanes = [[Lane(arm * len(asked) + row, 0, len(question.ids)) for row, question in enumerate(asked)]
                 for arm in range(len(arms))]
        mixture = Mixture(client, model.shape, arms, lanes, prefill)
        right[0].append(answered(model, model.hidden(ids, len(context.ids), ExactOverPrefill(prefill)), asked))
        hidden = model.hidden(ids.repeat(len(arms), 1), len(context.ids), mixture)
        for arm, part in enumerate(hidden.split(len(asked))):
            right[1 + arm].append(answered(model, part, asked))
            if not arms[arm].simulated:
                totals[arm].merge(mixture.bytes_read(arm))
        if not quiet:
            print(f"\r{task}: context {index + 1} of {contexts}, exact {np.mean(right[0]):.3f}", end="",
                  file=sys.stderr, flush=True)
    if not quiet:
        print(file=sys.stderr)
    right = [np.concatenate(one) for one in right]
    blocks = np.arange(contexts).repeat(questions)
    ratios = [1.0] + [mixture.ratios(i)[0] if arm.simulated else totals[i].ratio for i, arm in enumerate(arms)]
    return [compare(task, name, right[0], one, blocks, ratio)
            for name, one, ratio in zip(["exact", *(arm.name for arm in arms)], right, ratios)]


def answered(model: Model, hidden: torch.Tensor, asked: Sequence[tasks.Question]) -> np.ndarray:
    """Whether each question's answer is what greedy decoding says. hidden [questions, rows, width]."""
    right = []
    for states, question in zip(hidden, asked):
        begin, end = len(question.ids) - question.answer, len(question.ids)
        said = model.log_probs(states[begin - 1:end - 1]).argmax(-1).tolist()
        right.append(said == question.ids[begin:end])
    return np.array(right)


def compare(task: str, arm: str, exact: np.ndarray, right: np.ndarray, blocks: np.ndarray,
            ratio: float) -> TaskResult:
    difference = block_bootstrap([right.astype(float), exact.astype(float)],
                                 lambda a, b: float(a.mean() - b.mean()), blocks)
    return TaskResult(task, arm, len(right), float(right.mean()), difference, int(np.sum(exact & ~right)),
                      int(np.sum(right & ~exact)), mcnemar(exact, right), ratio)
