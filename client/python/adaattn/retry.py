"""Which errors a call is asked again for, and after which wait: the rule of docs/api.md."""
from __future__ import annotations

import dataclasses
import enum
import random
import time
from typing import Callable, Optional, TypeVar

import grpc

from adaattn.types import Error

Answer = TypeVar("Answer")
RETRY_AFTER = "adaattn-retry-after-seconds"


@dataclasses.dataclass(frozen=True)
class RetryOptions:
    max_attempts: int = 5           # the first included; 1 = never again
    initial_backoff: float = 0.02   # seconds
    max_backoff: float = 2.0
    multiplier: float = 2.0
    jitter: float = 0.5             # a wait is drawn from [1 - jitter, 1] times the backoff
    sleep: Callable[[float], None] = time.sleep


class Rule(enum.Enum):
    # May be applied twice without harm: appends (by the append-once rule) and idempotent calls.
    REPEATABLE = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED,
                            grpc.StatusCode.DEADLINE_EXCEEDED))
    # A second application would leave a session behind.
    CREATES = frozenset((grpc.StatusCode.UNAVAILABLE,))


class RetryState:
    """The waits of one call. RESOURCE_EXHAUSTED is asked again only where the server said when."""

    def __init__(self, options: RetryOptions, rule: Rule):
        self._options = options
        self._rule = rule
        self._random = random.Random()
        self.reset()

    def reset(self) -> None:
        """Forgets the attempts so far: something succeeded."""
        self._attempts = 0
        self._backoff = self._options.initial_backoff

    def next_wait(self, error: Error) -> Optional[float]:
        """Seconds to wait before asking again after `error`; None: do not."""
        self._attempts += 1
        exhausted = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        allowed = error.retry_after > 0 if exhausted else error.code in self._rule.value
        if not allowed or self._attempts >= self._options.max_attempts:
            return None
        wait = self._backoff * self._random.uniform(1 - self._options.jitter, 1.0)
        self._backoff = min(self._backoff * self._options.multiplier, self._options.max_backoff)
        return max(wait, error.retry_after)

    def wait_or_raise(self, error: Error) -> None:
        wait = self.next_wait(error)
        if wait is None:
            raise error
        self._options.sleep(wait)


def to_error(failure: grpc.RpcError) -> Error:
    """The Error of a failed call, with the server's hint from the trailing metadata."""
    hint = 0.0
    for key, value in failure.trailing_metadata() or ():
        if key == RETRY_AFTER:
            hint = float(value)
    return Error(failure.code(), failure.details() or "", hint)


def call(options: RetryOptions, rule: Rule, once: Callable[[], Answer]) -> Answer:
    """Runs `once` until it answers or must not be asked again. Errors: Error, of the last attempt."""
    state = RetryState(options, rule)
    while True:
        try:
            return once()
        except grpc.RpcError as failure:
            state.wait_or_raise(to_error(failure))
