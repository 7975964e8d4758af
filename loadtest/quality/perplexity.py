"""A text through the model, each row a decode step: perplexity, KL to exact, top-1 flips, bytes."""
from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
import torch

import adaattn
from quality import audit
from quality.arms import Arm
from quality.mixture import Mixture
from quality.model import Model, Prefill
from quality.retrieval import TaskResult, compare
from quality.served import BytesRead, segments
from quality.statistics import Interval, block_bootstrap
from quality.tasks import last_words

BLOCK_ROWS = 64  # of the bootstrap


@dataclasses.dataclass
class RowScores:
    """Of every row: -ln p of the next token, KL(exact || arm) in nats, whether the best token is another than
    with exact attention, whether it is the text's."""

    nll: np.ndarray
    kl: np.ndarray
    flip: np.ndarray
    right: np.ndarray


@dataclasses.dataclass
class ArmResult:
    """One arm over one text, with 95 % bootstrap intervals over blocks of rows."""

    arm: str
    perplexity: float
    perplexity_change: Interval  # relative to exact
    kl: Interval                 # mean, nats
    flips: Interval              # share of rows
    bytes_ratio: float           # of BF16's K and V bytes, metadata included
    basis_ratio: float           # on top


def score_rows(model: Model, exact: torch.Tensor, arms: Sequence[torch.Tensor], targets: torch.Tensor,
               chunk: int = 128) -> list[RowScores]:
    """Of exact itself, then of each arm. exact and each of arms [rows, width], targets [rows]."""
    columns = [[] for _ in range(1 + len(arms))]
    for begin in range(0, len(targets), chunk):
        rows = slice(begin, begin + chunk)
        log_p = model.log_probs(exact[rows])
        p, best = log_p.exp(), log_p.argmax(-1)
        for i, hidden in enumerate([exact, *arms]):
            log_q = model.log_probs(hidden[rows]) if i else log_p
            said = log_q.argmax(-1)
            columns[i].append((-log_q.gather(1, targets[rows, None])[:, 0], (p * (log_p - log_q)).sum(-1),
                               said != best, said == targets[rows]))
    return [RowScores(*(torch.cat(x).cpu().numpy() for x in zip(*one))) for one in columns]


class Document:
    """A text as tokens, and which of them end a last word."""

    def __init__(self, model: Model, text: str):
        encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.ids = torch.tensor(encoded.input_ids)
        starts = np.array([begin for begin, _ in encoded.offset_mapping])
        ends = np.array([end for _, end in encoded.offset_mapping])
        # Tokens [first, last] of each last word, a space before it included.
        self._words = [(int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(starts, end, "left")) - 1)
                       for begin, end in last_words(text)]

    def windows(self, skip: int, tokens: int, count: int) -> list[Window]:
        """`count` windows after `skip` tokens. Errors: ValueError when the text is too short."""
        if skip + tokens * count > len(self.ids):
            raise ValueError(f"the text has {len(self.ids)} tokens; {count} windows of {tokens} after {skip} need "
                             f"{skip + tokens * count}")
        return [Window(self.ids[begin:begin + tokens],
                       [(first - begin, last - begin) for first, last in self._words
                        if begin < first and last < begin + tokens])
                for begin in range(skip, skip + tokens * count, tokens)]


@dataclasses.dataclass(frozen=True)
class Window:
    ids: torch.Tensor              # [tokens]
    words: list[tuple[int, int]]   # tokens [first, last] of last words


def run(client: adaattn.Client, model: Model, windows: Sequence[Window], prefill_tokens: int, arms: Sequence[Arm],
        parallel: int = 16, quiet: bool = False) -> tuple[list[ArmResult], list[TaskResult], list[audit.AuditResult]]:
    """Of each window the first prefill_tokens are imported exactly, every later row is a decode step, in
    `parallel` segments side by side.

    Scored are the rows from prefill_tokens on that have a next token, and the last words of sentences among
    them: right when every token is the most probable one. The first result of both is exact. The third list has
    the errors of every arm's answers.
    """
    scores = [[] for _ in range(1 + len(arms))]
    right = [[] for _ in range(1 + len(arms))]
    totals = [BytesRead() for _ in arms]
    audits = [[] for _ in arms]
    for window in windows:
        prefill = Prefill(prefill_tokens)
        exact = model.hidden(window.ids[None], 0, prefill)[0, prefill_tokens:-1]
        targets = window.ids[prefill_tokens + 1:].to(model.device)
        new = window.ids[prefill_tokens:][None].expand(len(arms), -1)
        lanes = [segments(i, new.shape[1], parallel) for i in range(len(arms))]
        mixture = Mixture(client, model.shape, arms, lanes, prefill, quiet)
        audited = audit.Audited(mixture, prefill)
        hidden = model.hidden(new, prefill_tokens, audited)[:, :-1]
        # Row r of hidden stands at prefill_tokens + r and says the token after it.
        words = [(first - prefill_tokens - 1, last - prefill_tokens - 1) for first, last in window.words
                 if first > prefill_tokens]
        for i, one in enumerate(score_rows(model, exact, list(hidden), targets)):
            scores[i].append(one)
            right[i].append(np.array([one.right[first:last + 1].all() for first, last in words], bool))
        for i, arm in enumerate(arms):
            audits[i].append(audited.of_entry(i))
            if not arm.simulated:
                totals[i].merge(mixture.bytes_read(i))
    names = ["exact", *(arm.name for arm in arms)]
    ratios = [(1.0, 0.0)] + [mixture.ratios(i) if arm.simulated else (totals[i].ratio, totals[i].basis_ratio)
                             for i, arm in enumerate(arms)]
    joined = [RowScores(*(np.concatenate(column) for column in
                          zip(*(dataclasses.astuple(one) for one in of_arm)))) for of_arm in scores]
    right = [np.concatenate(one) for one in right]
    rows = [result_of(name, joined[0], one, *ratio) for name, one, ratio in zip(names, joined, ratios)]
    blocks = np.arange(len(right[0]))
    words = [compare("last words", name, right[0], one, blocks, ratio[0])
             for name, one, ratio in zip(names, right, ratios)]
    return rows, words, [audit.result_of(arm.name, arm.target, of_arm) for arm, of_arm in zip(arms, audits)]


def result_of(name: str, exact: RowScores, scores: RowScores, ratio: float, basis_ratio: float) -> ArmResult:
    blocks = np.arange(len(scores.nll)) // BLOCK_ROWS
    change = lambda nll, base: float(np.expm1(nll.mean(dtype=float) - base.mean(dtype=float)))
    return ArmResult(name, float(np.exp(scores.nll.mean())),
                     block_bootstrap([scores.nll, exact.nll], change, blocks),
                     block_bootstrap([scores.kl], lambda kl: float(kl.mean(dtype=float)), blocks),
                     block_bootstrap([scores.flip], lambda flip: float(flip.mean()), blocks), ratio, basis_ratio)
