"""The registered Zarr v3 data type `bfloat16`, for zarr-python, which does not bring it itself.

Importing this module registers the type. Entry points make zarr-python import it by itself wherever
this package is installed (zarr-python 3.1.6 only when a group is opened, newer ones always).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype import ZDType, data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize

NATIVE = np.dtype(ml_dtypes.bfloat16)
"""The NumPy dtype that holds bfloat16 values."""


# HasEndianness makes zarr record the byte order; other readers refuse an array without it.
@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """bfloat16 as `ml_dtypes.bfloat16`."""

    dtype_cls = type(NATIVE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if cls._check_native_dtype(dtype):
            return cls()
        raise DataTypeValidationError(f"{dtype} is not bfloat16")

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[Any]:
        return bool(dtype == NATIVE)

    def to_native_dtype(self) -> Any:
        return NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 is not a Zarr v2 data type")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"{data!r} is not bfloat16")

    def to_json(self, zarr_format: int) -> Any:
        if zarr_format == 3:
            return self._zarr_v3_name
        raise ValueError("bfloat16 is not a Zarr v2 data type")

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        if self._check_scalar(data):
            return ml_dtypes.bfloat16(data)
        raise TypeError(f"{data!r} is not a number")

    def default_scalar(self) -> Any:
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        return ml_dtypes.bfloat16(float(data))

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        value = float(data)  # type: ignore[arg-type]
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value


if "bfloat16" not in data_type_registry.contents:  # a newer zarr-python may bring its own
    data_type_registry.register("bfloat16", BFloat16)
