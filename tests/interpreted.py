"""The Triton kernels in Triton's interpreter, on CPU tensors: what lets tests run them.

Importing this module before anything imports triton makes every kernel of this process an
interpreted one. It repairs what the interpreter of triton 3.9 gets wrong: a product of bfloat16
multiplies their bits, and rounding to bfloat16 truncates. It also makes it faster, and
multiplies float32 as tensor cores do, so that the contract suite judges input_precision too.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable

import numpy as np
import torch

INTERPRETS = not torch.cuda.is_available()
"""A process has the kernels interpreted or compiled, not both: with a GPU, they run there."""

if INTERPRETS:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton, and then each kernel, is defined
try:
    import triton.experimental.gluon  # noqa: F401 - a launch imports it, when it is too late
    import triton.language as tl
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    import attn_ext.triton_kernels.launch  # noqa: F401
finally:
    os.environ.pop("TRITON_INTERPRET", None)

# Problems that these kernels leave to other backends; any other refusal is a failure.
REFUSALS = (
    r"backend 'triton' can't run this: (query is float64|query has a head_dim of (384|512|1000); )"
)

# What the interpreter runs of the contract suite in every run: about two minutes.
BY_DEFAULT = {
    *(
        f"test_case_in_float32[{case}]"
        for case in (
            "plain", "grouped_heads", "causal_lower_right_tall", "window", "bool_mask_heads",
            "float_mask_keys", "padding_float", "softcap_grouped_causal", "alibi_per_batch",
            "sinks_and_hidden_rows", "dropout_shifted", "positions_far_away", "everything",
            "plain_wide", "one_by_one", "negative_scale", "no_scale", "no_keys_with_sinks", "no_queries",
            "no_value_dim", "length_65",
        )
    ),
    "test_case_in_other_dtypes[float_mask-bfloat16]",
    "test_case_in_other_dtypes[plain-float16]",
    "test_case_in_other_dtypes[plain-float64]",
    "test_any_strides[bfloat16-head_dim not contiguous]",
    "test_any_strides[float32-broadcast batch]",
    "test_output_lies_in_querys_memory_order",
    "test_garbage_reaches_only_rows_that_see_it[causal-key-nan]",
    "test_garbage_reaches_only_rows_that_see_it[padding-value-inf]",
    "test_rows_without_keys[False]",
    "test_lowest_numbers_forbid[float32-float32-3]",
    "test_lowest_numbers_forbid[bfloat16-bfloat16-3]",
    "test_scores_that_climb[1-0.02-bfloat16]",
    "test_case_in_float32[dropout_of_whole_tiles]",
    "test_dropout_is_the_same_everywhere[0.4]",
    "test_weights_are_the_ones_used[True]",
    "test_mask_dtypes[bfloat16-float32]",
    "test_mask_without_a_key_dimension[shape1]",
}  # fmt: skip


def _widened(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to the 10 bits of TF32, ties away from zero, as cvt.rna.tf32.f32 does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    if precision == "TF32":
        return np.matmul(_tf32(a), _tf32(b))
    if precision == "TF32x3":
        big_a, big_b = _tf32(a), _tf32(b)
        with np.errstate(invalid="ignore"):
            small_a, small_b = _tf32(a - big_a), _tf32(b - big_b)
            # As Triton's compiler has it: what is NaN of inf times a small part is left out.
            crossed = np.matmul(big_a, small_b) + np.matmul(small_a, big_b)
            return np.matmul(big_a, big_b) + np.where(np.isnan(crossed), 0, crossed)
    return np.matmul(a, b)


class _Builder(interpreter.InterpreterBuilder):
    """The repaired operations."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = _product(_widened(a), _widened(b), str(input_precision).rpartition(".")[2])
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(_widened(src), target)
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)


@functools.cache
def _patch_language_of(module: str, function: Callable[..., object]) -> None:
    """What Triton's own device functions call; it stays patched."""
    if module.startswith("triton."):
        interpreter._patch_lang(function)


def _call(function: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """A device function's call. The kernel that it is in has patched triton.language already."""
    _patch_language_of(function.fn.__module__, function.fn)
    return function.rewrite()(*args, **kwargs)


# The interpreter's time goes into types and shapes, of which there are few and always the same. What
# Triton makes of them is found once; where nothing has to be cast or broadcast, it is not asked.
_initialize_block = core.block_type.__init__
_initialize_tensor = core.tensor.__init__
_numpy_dtype_of = interpreter._get_np_dtype
_same_dtype = core.dtype.__eq__
_unwrap = core._unwrap_if_constexpr
_broadcast_of = TritonSemantic.broadcast_impl_value
_operands_of = TritonSemantic.binary_op_type_checking_impl
_computation_type_of = TritonSemantic.computation_type_impl


def _block_type(self: core.block_type, element_ty: core.dtype, shape: Iterable[object]) -> None:
    sizes = tuple([x.value if isinstance(x, core.constexpr) else x for x in shape])
    known = vars(element_ty).setdefault("_blocks", {})
    if sizes not in known:
        _initialize_block(self, element_ty, shape)
        # Found once, for every type of these sizes.
        core.tensor(None, self)
        interpreter._get_np_dtype(self)
        known[sizes] = {**vars(self), "_sizes": sizes, "_constants": {}}
    vars(self).update(known[sizes])


def _tensor(self: core.tensor, handle: object, type: core.dtype) -> None:
    known = vars(type)
    if "_of_tensors" not in known:
        _initialize_tensor(self, handle, type)
        known["_of_tensors"] = {name: x for name, x in vars(self).items() if name != "handle"}
    vars(self).update(known["_of_tensors"], handle=handle)


def _numpy_dtype(type: core.dtype) -> np.dtype:
    known = vars(type)
    if "_numpy" not in known:
        known["_numpy"] = _numpy_dtype_of(type)
    return known["_numpy"]


def _equal_dtypes(self: core.dtype, other: object) -> bool:
    return self is other or _same_dtype(self, other)


_CONTAINERS = (list, tuple, core.tuple, core.constexpr)


def _unwrapped(x: object) -> object:
    return _unwrap(x) if isinstance(x, _CONTAINERS) else x


def _type_of(element_ty: core.dtype, sizes: tuple[int, ...]) -> core.block_type:
    known = vars(element_ty).setdefault("_types", {})
    if sizes not in known:
        known[sizes] = core.block_type(element_ty, list(sizes))
    return known[sizes]


def _broadcast(
    self: TritonSemantic, left: core.tensor, right: core.tensor
) -> tuple[core.tensor, core.tensor]:
    # Of scalars: None.
    left_sizes, right_sizes = (vars(x.type).get("_sizes") for x in (left, right))
    if left_sizes == right_sizes:
        return left, right
    if left_sizes is None:
        return _splat(self, left, right_sizes), right
    if right_sizes is None:
        return left, _splat(self, right, left_sizes)
    return _broadcast_of(self, left, right)


def _splat(self: TritonSemantic, scalar: core.tensor, sizes: tuple[int, ...]) -> core.tensor:
    kind = _type_of(scalar.dtype, sizes)
    return core.tensor(self.builder.create_splat(kind, scalar.handle), kind)


def _constant_beside(
    self: TritonSemantic, tensor: core.tensor, number: float, *rules: bool
) -> core.tensor | None:
    """What a number becomes in an operation with a tensor; None if it is the tensor that is cast."""
    known = vars(tensor.type).setdefault("_constants", {})
    key = (repr(number), *rules)
    if key not in known:
        same, constant = _operands_of(self, tensor, number, False, False, *rules)
        constant.handle.data.flags.writeable = False
        known[key] = constant if same is tensor else None
    return known[key]


def _operands(
    self: TritonSemantic,
    left: core.tensor | float,
    right: core.tensor | float,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> tuple[core.tensor, core.tensor]:
    rules = (arithmetic_check, div_or_mod)
    left_is_tensor, right_is_tensor = (isinstance(x, core.tensor) for x in (left, right))
    if left_is_tensor and right_is_tensor:
        if not div_or_mod and left.dtype is right.dtype and not left.dtype.is_ptr():
            return _broadcast(self, left, right)
    elif left_is_tensor and not left.dtype.is_ptr():
        constant = _constant_beside(self, left, right, *rules)
        if constant is not None:
            return left, constant
    elif right_is_tensor and not right.dtype.is_ptr():
        constant = _constant_beside(self, right, left, *rules)
        if constant is not None:
            return constant, right
    return _operands_of(self, left, right, allow_lhs_ptr, allow_rhs_ptr, *rules)


@functools.cache
def _computation_type(self: TritonSemantic, *types: object) -> core.dtype:
    return _computation_type_of(self, *types)


def _patch_attribute(
    target: object,
    name: str,
    member: Callable[..., object],
    builder: object,
    scope: interpreter._LangPatchScope,
) -> None:
    def call(*args: object, **kwargs: object) -> object:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(target, name, call)


def _patch() -> None:
    core.block_type.__init__ = _block_type
    core.tensor.__init__ = _tensor
    core.dtype.__eq__ = _equal_dtypes
    core._unwrap_if_constexpr = _unwrapped
    TritonSemantic.broadcast_impl_value = _broadcast
    TritonSemantic.binary_op_type_checking_impl = _operands
    TritonSemantic.computation_type_impl = _computation_type
    interpreter._get_np_dtype = _numpy_dtype
    interpreter._patch_attr = _patch_attribute
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    interpreter.InterpretedFunction.__call__ = _call


if INTERPRETS:  # compiled kernels take Triton as it is
    _patch()
