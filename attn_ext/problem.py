"""The attention problem: what is asked, validated once and passed everywhere.

Everything below `functional` (dispatch, operators, backends, native kernels) takes a `Problem` and
may rely on what `Problem.build` checked: no layer checks an argument twice.

Glossary, used in the whole package: B batch, Hq query heads, Hkv key/value heads, Lq query length,
Lk key length, D head_dim of query and key, Dv head_dim of value.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

UNLIMITED = -1
"""A window side of this value reaches to the end of the sequence."""

CAUSAL_MODES = (None, "upper_left", "lower_right")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_LENGTH = 2**31 - 1
"""Longest sequence, and most batch*heads: dropout counts rows, columns and heads in 32 bits."""

LOWEST_ENTRY = math.log(2) * torch.finfo(torch.float32).min
"""An entry of a floating mask below it forbids its pair, as -inf does: times log2(e) it is -inf in
float32. Masks of Transformers and others hold float32's or bfloat16's lowest number instead of
-inf, beside which a score is lost in rounding, as is the number of keys in LSE. float16's lowest
number, -65504, is an entry like any other."""


@dataclasses.dataclass(slots=True)
class Problem:
    """One attention problem. Build it with `Problem.build`, which raises on anything wrong.

    Attributes:
        query: (B, Hq, Lq, D).
        key: (B, Hkv, Lk, D), Hq a multiple of Hkv.
        value: (B, Hkv, Lk, Dv).
        attn_mask: 4-D and broadcastable to (B, Hq, Lq, Lk), never expanded; bool (True takes part)
            or floating (added to the scores; an entry below LOWEST_ENTRY forbids the pair).
        sinks: (Hq,), a logit per head that takes part in the softmax and has no value.
        key_padding_mask: (B, Lk), bool (True takes part) or floating (added, as attn_mask).
        alibi_slopes: (Hq,) or (B, Hq), float32; adds -slope * |row - column| to the scores.
        dropout_p: probability that a weight is dropped, in [0, 1).
        seed: key of the dropout's random numbers, 64 bits; an int or an int64 tensor of one
            element.
        offset: selects another stream under the same seed, 32 bits.
        causal: None, "upper_left" or "lower_right".
        window: (left, right), how many keys before and after the diagonal a row sees; -1: all.
        scale: factor on query @ key^T.
        softcap: scores become softcap * tanh(scores / softcap); 0 leaves them.
        q_start: absolute position of the first query row.
        k_start: absolute position of the first key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    sinks: Tensor | None = None
    key_padding_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor = 0
    offset: int = 0
    causal: str | None = None
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    scale: float = 1.0
    softcap: float = 0.0
    q_start: int = 0
    k_start: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The 7 tensors, differentiable ones first: `Problem(*tensors, *settings)` is a copy."""
        return (
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.sinks,
            self.key_padding_mask,
            self.alibi_slopes,
        )

    @property
    def settings(self) -> tuple[Any, ...]:
        """All but the tensors."""
        return (
            self.dropout_p,
            self.seed,
            self.offset,
            self.causal,
            self.window,
            self.scale,
            self.softcap,
            self.q_start,
            self.k_start,
        )

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_heads(self) -> int:
        return self.query.shape[1]

    @property
    def query_length(self) -> int:
        return self.query.shape[2]

    @property
    def key_length(self) -> int:
        return self.key.shape[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of accumulation and of LSE: float64 for float64, else float32."""
        return torch.float64 if self.query.dtype is torch.float64 else torch.float32

    @property
    def diagonal(self) -> int:
        """Key index that stands on the diagonal of row 0, where row and key positions meet."""
        offset = self.q_start - self.k_start
        if self.causal == "lower_right":
            offset += self.key_length - self.query_length
        return offset

    @property
    def reach(self) -> tuple[int, int]:
        """(left, right): keys that a row sees before and after its diagonal; -1 is all of them."""
        left, right = self.window
        return left, (0 if self.causal is not None else right)

    @property
    def seed_value(self) -> int:
        """The seed as an unsigned 64-bit int."""
        return int(self.seed) & 0xFFFF_FFFF_FFFF_FFFF

    def replace(self, **changes: Any) -> Problem:
        """A copy with some attributes changed; nothing is checked again."""
        return dataclasses.replace(self, **changes)

    @staticmethod
    def build(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        causal: bool | str | None = None,
        window: tuple[int | None, int | None] | int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        q_start: int = 0,
        k_start: int = 0,
    ) -> Problem:
        """Check every argument and normalise it.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: an argument's shape, device or value is wrong.
        """
        _check_tensors(query, key, value)
        problem = Problem(query, key, value)
        # Most calls leave most arguments at their defaults, which need no check.
        if scale is None:
            problem.scale = default_scale(query.shape[3])
        else:
            problem.scale = _checked_number("scale", scale)
        if causal is not None:
            problem.causal = checked_causal(causal)
        if window is not None:
            problem.window = _checked_window(window)
        if type(dropout_p) is not float or dropout_p != 0.0:
            problem.dropout_p = _checked_probability(dropout_p)
        if softcap is not None:
            problem.softcap = _checked_number("softcap", softcap)
            if problem.softcap < 0:
                raise ValueError(f"softcap must be positive, or 0 or None for none, got {softcap}")
        if type(q_start) is not int or q_start != 0:
            problem.q_start = _checked_int("q_start", q_start)
        if type(k_start) is not int or k_start != 0:
            problem.k_start = _checked_int("k_start", k_start)
        if not (attn_mask is key_padding_mask is alibi_slopes is sinks is None):
            problem._add(attn_mask, key_padding_mask, alibi_slopes, sinks)
        return problem

    def _add(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        """Check and take the optional tensors."""
        query = self.query
        batch, query_heads, query_length, _ = query.shape
        key_length = self.key_length
        if attn_mask is not None:
            shape = (batch, query_heads, query_length, key_length)
            self.attn_mask = resolved(_checked_mask(attn_mask, query, shape))
        if key_padding_mask is not None:
            _check_mask_tensor("key_padding_mask", key_padding_mask, query)
            if key_padding_mask.shape != (batch, key_length):
                raise ValueError(
                    f"key_padding_mask must have shape (batch, key length) = "
                    f"{(batch, key_length)}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            self.key_padding_mask = resolved(key_padding_mask)
        if alibi_slopes is not None:
            _check_tensor("alibi_slopes", alibi_slopes, query)
            if alibi_slopes.shape not in ((query_heads,), (batch, query_heads)):
                raise ValueError(
                    f"alibi_slopes must have shape (query heads,) = {(query_heads,)} or (batch, "
                    "query heads) "
                    f"= {(batch, query_heads)}, got {tuple(alibi_slopes.shape)}"
                )
            self.alibi_slopes = resolved(alibi_slopes).to(self.compute_dtype)
        if sinks is not None:
            _check_tensor("sinks", sinks, query)
            if sinks.shape != (query_heads,):
                raise ValueError(
                    f"sinks must have shape (query heads,) = {(query_heads,)}, got "
                    f"{tuple(sinks.shape)}"
                )
            self.sinks = resolved(sinks)


def resolved(tensor: Tensor) -> Tensor:
    """A view that negates what it shows, as `x.conj().imag` does, as what it shows."""
    return tensor.resolve_neg() if not torch.compiler.is_compiling() and tensor.is_neg() else tensor


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def _are_usual(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these certainly pass `_check_tensors`, found out in a quarter of the time."""
    if not (
        type(query) is type(key) is type(value) is Tensor
        and query.dtype is key.dtype is value.dtype
        and query.dtype in FLOAT_DTYPES
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and query.layout is key.layout is value.layout is torch.strided
        and not (query.is_nested or key.is_nested or value.is_nested)
    ):
        return False
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not (len(query_shape) == len(key_shape) == len(value_shape) == 4):
        return False
    batch, heads, length, head_dim = query_shape
    key_batch, key_heads, key_length, key_dim = key_shape
    return (
        batch == key_batch
        and heads == key_heads
        and head_dim == key_dim > 0
        and (key_shape == value_shape or key_shape[:3] == value_shape[:3])
        and length <= MAX_LENGTH
        and key_length <= MAX_LENGTH
        and batch * heads <= MAX_LENGTH
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if _are_usual(query, key, value):
        return
    _check_tensor("query", query, query)
    _check_tensor("key", key, query)
    _check_tensor("value", value, query)
    if query.dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be 4-D (batch, heads, length, head_dim), got shape "
                f"{tuple(tensor.shape)}"
            )
    batch, query_heads, query_length, head_dim = query.shape
    if key.shape[0] != batch:
        raise ValueError(f"key must have query's batch size {batch}, got {key.shape[0]}")
    if key.shape[3] != head_dim:
        raise ValueError(f"key must have query's head_dim {head_dim}, got {key.shape[3]}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have key's batch, heads and length {tuple(key.shape[:3])}, "
            f"got {tuple(value.shape[:3])}"
        )
    if head_dim == 0:
        raise ValueError("query must have a head_dim of at least 1, got 0")
    key_heads = key.shape[1]
    if key_heads != query_heads and (key_heads == 0 or query_heads % key_heads != 0):
        raise ValueError(
            f"query must have a multiple of key's {key_heads} heads (grouped-query attention), "
            f"got {query_heads}"
        )
    if query_length > MAX_LENGTH or key.shape[2] > MAX_LENGTH:
        raise ValueError(
            f"query and key must be at most {MAX_LENGTH} long, got {query_length} and "
            f"{key.shape[2]}"
        )
    if batch * query_heads > MAX_LENGTH:
        raise ValueError(
            f"query must have at most {MAX_LENGTH} batch*heads, got {batch}*{query_heads}"
        )


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense strided tensor, got layout {tensor.layout}")
    if name != "query" and not (tensor.is_floating_point() or tensor.dtype is torch.bool):
        raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def _check_mask_tensor(name: str, mask: Tensor, query: Tensor) -> None:
    _check_tensor(name, mask, query)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"{name} must be bool (True takes part), float32 or query's dtype {query.dtype}, got "
            f"{mask.dtype}"
        )
    if mask.dtype is torch.float32 and query.dtype is torch.float64:
        raise TypeError(f"{name} must be bool or query's dtype torch.float64, got torch.float32")


def _checked_mask(mask: Tensor, query: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    _check_mask_tensor("attn_mask", mask, query)
    fits = mask.dim() <= 4 and all(
        size == 1 or size == wanted
        for size, wanted in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to (batch, query heads, query length, key length) = "
            f"{shape}, "
            f"got shape {tuple(mask.shape)}"
        )
    return as_four_dimensional(mask)


def as_four_dimensional(mask: Tensor) -> Tensor:
    """A mask of fewer dimensions as one that broadcasts alike."""
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def _checked_probability(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return float(dropout_p)


def checked_causal(causal: bool | str | None) -> str | None:
    if causal is True:
        return "upper_left"
    if causal is None or causal is False:
        return None
    if causal not in CAUSAL_MODES:
        raise ValueError(
            f'causal must be False, True, "upper_left" or "lower_right", got {causal!r}'
        )
    return causal


def _checked_window(window: tuple[int | None, int | None] | int | None) -> tuple[int, int]:
    if window is None:
        return (UNLIMITED, UNLIMITED)
    if isinstance(window, int) and not isinstance(window, bool):
        window = (window, window)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be an int or a pair (left, right), got {window!r}")
    left, right = (UNLIMITED if side is None else _checked_int("window", side) for side in window)
    if left < UNLIMITED or right < UNLIMITED:
        raise ValueError(
            f"window must hold sizes of at least 0, or None or -1 for no limit, got {tuple(window)}"
        )
    return (left, right)


def _checked_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if not -(2**62) < value < 2**62:
        raise ValueError(f"{name} must fit in 63 bits, got {value}")
    return value


def _checked_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
