"""numpy arrays to Tensor messages and back.

The wire knows float32, float16, bfloat16 and float8_e4m3fn; the last two are ml_dtypes' types.
"""
from __future__ import annotations

from typing import Optional, Sequence

import ml_dtypes
import numpy as np

from adaattn.types import DType
from adaattn.v1 import attention_pb2 as pb

_TYPES = {
    DType.FP32: np.dtype("<f4"),
    DType.FP16: np.dtype("<f2"),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
}
_DTYPES = {numpy_type: dtype for dtype, numpy_type in _TYPES.items()}


def to_tensor(array: np.ndarray, scales: Optional[Sequence[float]] = None) -> pb.Tensor:
    """A message with the array's elements, row-major.

    scales: FP8 only, one factor per head. Errors: TypeError for element types that have no wire form.
    """
    array = np.asarray(array)
    dtype = _DTYPES.get(array.dtype)
    if dtype is None:
        raise TypeError(f"dtype {array.dtype} has no wire form; use float32, float16, or bfloat16 or "
                        "float8_e4m3fn of ml_dtypes")
    return pb.Tensor(dtype=int(dtype), shape=array.shape, data=array.tobytes(), scales=scales or ())


def from_tensor(tensor: pb.Tensor) -> np.ndarray:
    """A read-only array over the message's bytes. Errors: ValueError where shape and bytes disagree."""
    return np.frombuffer(tensor.data, _TYPES[DType(tensor.dtype)]).reshape(tuple(tensor.shape))
