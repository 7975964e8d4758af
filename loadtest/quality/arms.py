"""The ways of answering attention that are compared."""
from __future__ import annotations

import dataclasses
from typing import Optional

import adaattn
from adaattn.v1 import attention_pb2 as pb
from quality.dense import CODES


AUDITED_PROFILE = "audited"
TARGETED = {"budget": adaattn.Policy.BUDGET, "audited": adaattn.Policy.BUDGET,
            "feedback": adaattn.Policy.FEEDBACK, "learned": adaattn.Policy.LEARNED}  # policies that aim at an error


@dataclasses.dataclass(frozen=True)
class Arm:
    """A page format and options of the server, or a dense quantiser of dense.py (`simulated`)."""

    name: str
    page_format: adaattn.PageFormat = adaattn.PageFormat.DEFAULT
    options: adaattn.AttendOptions = adaattn.AttendOptions()
    simulated: Optional[str] = None
    basis: str = ""  # of ladder.fit_basis, brought along; "": the server's own fit
    profile: str = ""  # of served.profile_name; "": none
    exact_tier: int = pb.EXACT_TIER_NONE

    @property
    def target(self) -> Optional[float]:
        """The relative error that the options aim at, if they do."""
        return self.options.target_relative_error or None


def threshold(theta: float, coarse_rank: int, coarse_z: float = 2.0) -> adaattn.AttendOptions:
    """coarse_rank 0: a one-stage scan."""
    return adaattn.AttendOptions(policy=adaattn.Policy.THRESHOLD, theta=theta, coarse_rank=coarse_rank,
                                 coarse_z=coarse_z)


def parse(text: str, head_dim: int) -> Arm:
    """bf16 | fp8 | served-fp8 | int8 | int4 | theta=T | two-stage=T[/Z[/R]] | unrotated=T[/Z[/R]] | budget=E | audited=E | feedback=E[/Z[/R]] | learned=E | entropy=T | static=K/R/V | full

    theta: the ladder after a one-stage scan; two-stage: R channels first (half of them), margin Z (2); unrotated:
    that without a rotation of keys, channels ordered by what queries look at; budget, audited, feedback and learned:
    the target relative error, audited with error factors that audits gave, feedback with Z in two stages; entropy:
    theta in units of an equal page's share; static: key bits, rank, value bits. Errors: ValueError.
    """
    name, _, value = text.partition("=")
    progressive = adaattn.PageFormat.PROGRESSIVE
    if text in CODES:
        return Arm(text, simulated=text)
    if text == "bf16":
        return Arm(text, adaattn.PageFormat.BF16)
    if text == "served-fp8":
        return Arm(text, adaattn.PageFormat.FP8_E4M3)
    if text == "full":
        return Arm(text, progressive, adaattn.AttendOptions(mode=adaattn.Mode.FULL_DEPTH))
    if name == "theta":
        return Arm(text, progressive, threshold(float(value), 0))
    if name in ("two-stage", "unrotated"):
        theta, z, rank, *_ = [*value.split("/"), "", ""]
        return Arm(text, progressive, threshold(float(theta), int(rank or head_dim // 2), float(z or 2)),
                   basis="none" if name == "unrotated" else "")
    if name == "feedback" and "/" in value:
        target, z, rank, *_ = [*value.split("/"), ""]
        return Arm(text, progressive, adaattn.AttendOptions(
            policy=adaattn.Policy.FEEDBACK, target_relative_error=float(target), coarse_rank=int(rank or head_dim // 2),
            coarse_z=float(z)))
    if name in TARGETED:
        return Arm(text, progressive, adaattn.AttendOptions(policy=TARGETED[name], target_relative_error=float(value)),
                   profile=AUDITED_PROFILE if name == "audited" else "")
    if name == "entropy":
        return Arm(text, progressive, adaattn.AttendOptions(policy=adaattn.Policy.ENTROPY, theta=float(value)))
    if name == "static":
        key_bits, rank, value_bits = map(int, value.split("/"))
        return Arm(text, progressive, adaattn.AttendOptions(
            mode=adaattn.Mode.STATIC, static_key_bits=key_bits, static_rank=rank, static_value_bits=value_bits))
    raise ValueError(f"arm {text!r}: must be bf16, fp8, served-fp8, int8, int4, theta=T, two-stage=T[/Z[/R]], "
                     "unrotated=T[/Z[/R]], budget=E, audited=E, feedback=E[/Z[/R]], learned=E, entropy=T, static=KEY_BITS/RANK/VALUE_BITS or full")
