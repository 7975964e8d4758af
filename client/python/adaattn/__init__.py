"""Client of AdaAttn: a server that keeps KV caches and answers attention."""
from adaattn.client import Client, Session, Step
from adaattn.local_server import LocalServer
from adaattn.retry import RetryOptions
from adaattn.stream import AttendStream
from adaattn.types import (
    AttendOptions,
    AttendResult,
    Decision,
    Detail,
    DType,
    Error,
    Fallback,
    HeadDecision,
    LayerOptions,
    Mode,
    ModelShape,
    PageFormat,
    Policy,
    Profile,
    SequenceResult,
    SessionGrant,
    StageTimes,
)

__all__ = [
    "AttendOptions", "AttendResult", "AttendStream", "Client", "Decision", "Detail", "DType", "Error",
    "Fallback", "HeadDecision", "LayerOptions", "LocalServer", "Mode", "ModelShape", "PageFormat", "Policy",
    "Profile", "RetryOptions", "SequenceResult", "Session", "SessionGrant", "StageTimes", "Step",
]
