"""The problems of the contract suite."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attn_ext
from attn_ext.backends import reference
from attn_ext.benchmark.accuracy import error
from attn_ext.problem import Problem

Options = dict[str, Any]

DEVICE_BACKENDS = tuple(x for x in attn_ext.BACKENDS if x not in ("cpu", "reference"))
"""Those for GPUs, which the contract suite runs where torch finds one."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """B, Hq, Hkv, Lq, Lk, D, Dv: all different where nothing speaks against it."""

    batch: int = 2
    query_heads: int = 3
    key_heads: int = 3
    query_length: int = 61
    key_length: int = 83
    head_dim: int = 20
    value_dim: int = 13


@dataclasses.dataclass(frozen=True)
class Case:
    """A named problem: its sizes and what `attention` is asked for, made in float64."""

    name: str
    options: Callable[[Sizes], Options]
    sizes: Sizes = Sizes()


def _bool_mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def _float_mask(*shape: int) -> Tensor:
    mask = torch.randn(shape, dtype=torch.float64)
    return mask.masked_fill(torch.rand(shape) < 0.15, float("-inf"))


def _mask_of_tiles(s: Sizes) -> Tensor:
    """0, -inf or random numbers, the same kind over what any instruction set takes for a tile."""
    rows, keys = torch.arange(s.query_length)[:, None], torch.arange(s.key_length)
    kind = (rows // 48 + keys // 128) % 3
    mask = torch.randn(s.query_length, s.key_length, dtype=torch.float64)
    return mask.masked_fill(kind == 0, 0.0).masked_fill(kind == 1, float("-inf"))


def _mask_of_lengths(s: Sizes, hidden: float) -> Tensor:
    """(B, S): 0 for as many keys as a sequence has, then `hidden`."""
    lengths = torch.tensor([s.key_length // 3, s.key_length - 10])[: s.batch, None]
    mask = torch.zeros(s.batch, s.key_length, dtype=torch.float64)
    return mask.masked_fill(torch.arange(s.key_length) >= lengths, hidden)


def _everything(s: Sizes) -> Options:
    return {
        "attn_mask": _float_mask(s.batch, 1, s.query_length, s.key_length),
        "key_padding_mask": _bool_mask(s.batch, s.key_length),
        "causal": "lower_right",
        "window": (40, None),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(s.query_heads),
        "sinks": torch.randn(s.query_heads, dtype=torch.float64),
        "dropout_p": 0.2,
        "seed": 2**63 + 11,
        "offset": 5,
    }


def _heads_take_turns(s: Sizes) -> Options:
    """All that heads of one block may differ in."""
    options = _everything(s)
    del options["alibi_slopes"], options["dropout_p"]
    mask = _float_mask(s.query_heads, s.query_length, s.key_length)
    return {**options, "attn_mask": mask, "window": (40, 9)}


GROUPED = Sizes(query_heads=6, key_heads=2)
DECODE = Sizes(query_heads=6, key_heads=2, query_length=1, key_length=701)
MANY_ROWS = Sizes(1, 4, 2, 130, 150, 40, 56)
SQUARE = Sizes(query_length=97, key_length=97)
TALL = Sizes(query_length=83, key_length=61)

CASES = [
    Case("plain", lambda s: {}),
    Case("grouped_heads", lambda s: {}, GROUPED),
    Case("one_key_head", lambda s: {"causal": True}, Sizes(query_heads=5, key_heads=1)),
    Case("scale", lambda s: {"scale": 0.7}),
    Case("causal_upper_left", lambda s: {"causal": "upper_left"}),
    Case("causal_upper_left_tall", lambda s: {"causal": True}, TALL),
    Case("causal_lower_right", lambda s: {"causal": "lower_right"}),
    Case("causal_lower_right_tall", lambda s: {"causal": "lower_right"}, TALL),
    Case("window", lambda s: {"window": (7, 11)}),
    Case("window_left_only", lambda s: {"window": (9, None)}),
    Case("window_right_only", lambda s: {"window": (None, 5)}),
    Case("window_of_the_diagonal", lambda s: {"window": 0}, SQUARE),
    Case("causal_window", lambda s: {"causal": "lower_right", "window": (17, 3)}),
    Case(
        "narrow_window_long",
        lambda s: {"causal": True, "window": (5, 0)},
        Sizes(query_length=301, key_length=301),
    ),
    Case("bool_mask", lambda s: {"attn_mask": _bool_mask(s.query_length, s.key_length)}),
    Case("bool_mask_heads", lambda s: {"attn_mask": _bool_mask(s.query_heads, 1, s.key_length)}),
    Case("bool_mask_rows", lambda s: {"attn_mask": _bool_mask(s.batch, 1, s.query_length, 1)}),
    Case(
        "bool_mask_blocks",
        lambda s: {"attn_mask": torch.arange(s.key_length) // 64 % 2 == torch.tensor(1)},
        Sizes(key_length=200),
    ),
    Case("float_mask", lambda s: {"attn_mask": _float_mask(s.query_length, s.key_length)}),
    Case(
        "float_mask_full",
        lambda s: {
            "attn_mask": _float_mask(s.batch, s.query_heads, s.query_length, s.key_length)
        },
        GROUPED,
    ),
    Case("float_mask_keys", lambda s: {"attn_mask": _float_mask(s.batch, 1, 1, s.key_length)}),
    Case("float_mask_scalar", lambda s: {"attn_mask": torch.zeros(1, dtype=torch.float64)}, Sizes(key_length=1)),
    Case("padding", lambda s: {"key_padding_mask": _bool_mask(s.batch, s.key_length)}),
    Case("padding_float", lambda s: {"key_padding_mask": _float_mask(s.batch, s.key_length)}),
    Case("padding_and_causal", lambda s: {"key_padding_mask": _bool_mask(s.batch, s.key_length), "causal": True}),
    Case("softcap", lambda s: {"softcap": 1.5}),
    Case("softcap_grouped_causal", lambda s: {"softcap": 5.0, "causal": "lower_right"}, GROUPED),
    Case("alibi", lambda s: {"alibi_slopes": torch.rand(s.query_heads)}),
    Case("alibi_per_batch", lambda s: {"alibi_slopes": torch.rand(s.batch, s.query_heads), "causal": "lower_right"}),
    Case("sinks", lambda s: {"sinks": torch.randn(s.query_heads, dtype=torch.float64)}),
    Case("sinks_and_hidden_rows", lambda s: {"sinks": torch.randn(s.query_heads, dtype=torch.float64), "causal": "lower_right"}, TALL),
    Case("dropout", lambda s: {"dropout_p": 0.3, "seed": 7}),
    Case("dropout_shifted", lambda s: {"dropout_p": 0.6, "seed": 2**40, "offset": 3, "q_start": 5, "k_start": 6, "causal": True}, GROUPED),
    Case("dropout_of_whole_tiles", lambda s: {"dropout_p": 0.5, "seed": 8, "q_start": 48, "k_start": 32, "causal": True}, Sizes(1, 4, 2, 150, 163, 64, 64)),
    Case("positions", lambda s: {"causal": True, "q_start": 30, "k_start": 10}),
    Case("positions_far_away", lambda s: {"causal": True, "q_start": 2**33, "k_start": 0}),
    Case("everything", _everything, GROUPED),
    Case("everything_wide", _everything, Sizes(1, 4, 2, 40, 50, 200, 230)),
    Case("plain_wide", lambda s: {}, Sizes(1, 4, 2, 70, 75, 256, 192)),
    Case("one_by_one", lambda s: {"causal": True}, Sizes(1, 1, 1, 1, 1, 1, 1)),
    Case("one_query", lambda s: {"causal": "lower_right"}, Sizes(query_length=1, key_length=150)),
    Case("decode", lambda s: {"causal": "lower_right"}, DECODE),
    Case("decode_one_row", lambda s: {}, Sizes(query_length=1, key_length=640, head_dim=64, value_dim=64)),
    Case("decode_two_rows", lambda s: {"window": (300, 100), "causal": "lower_right"}, Sizes(query_length=2, key_length=530)),
    Case("decode_four_rows", lambda s: {}, Sizes(query_heads=8, key_heads=2, query_length=1, key_length=520, head_dim=80, value_dim=112)),
    Case("decode_six_rows", lambda s: {"causal": "lower_right"}, Sizes(query_heads=6, key_heads=2, query_length=2, key_length=601, head_dim=33)),
    Case("decode_padding", lambda s: {"key_padding_mask": torch.arange(s.key_length) < torch.tensor([[300], [650]])}, DECODE),
    Case("decode_everything", lambda s: {**_everything(s), "window": (400, None), "dropout_p": 0.0}, DECODE),
    Case("decode_negative_scale", lambda s: {"scale": -0.3, "attn_mask": _float_mask(s.query_length, s.key_length)}, DECODE),
    Case("negative_scale", lambda s: {"scale": -0.3, "causal": True}),
    Case("no_scale", lambda s: {"scale": 0.0, "causal": True}),
    Case("one_key", lambda s: {}, Sizes(key_length=1)),
    Case("no_keys", lambda s: {}, Sizes(key_length=0)),
    Case("no_keys_with_sinks", lambda s: {"sinks": torch.zeros(s.query_heads, dtype=torch.float64)}, Sizes(key_length=0)),
    Case("no_queries", lambda s: {}, Sizes(query_length=0)),
    Case("no_batch", lambda s: {}, Sizes(batch=0)),
    Case("no_value_dim", lambda s: {}, Sizes(value_dim=0)),
    Case("head_dim_16", lambda s: {}, Sizes(head_dim=16, value_dim=16)),
    Case("head_dim_64", lambda s: {"causal": True}, Sizes(head_dim=64, value_dim=64)),
    Case("head_dim_512", lambda s: {}, Sizes(1, 2, 2, 50, 70, 512, 509)),
    Case("head_dim_1000", lambda s: {}, Sizes(1, 1, 1, 40, 60, 1000, 20)),
    # Maxima that rise and fall from block to block, each row's at other keys.
    Case("moving_maxima", lambda s: {"attn_mask": 30 * torch.sin(torch.arange(s.query_length, dtype=torch.float64)[:, None] + torch.arange(s.key_length) / 50)}, Sizes(1, 1, 1, 33, 200, 64, 64)),
    # AMX: whole tiles and a rest in every product, an even and an odd number of tiles.
    Case("rests_of_tiles", lambda s: {"causal": "lower_right"}, Sizes(1, 4, 2, 97, 305, 100, 77)),
    # Its backward pass: more rows than one group of blocks has, and parts of tiles that a mask hides.
    Case("groups_of_rows", lambda s: {"causal": True, "dropout_p": 0.2, "seed": 5}, Sizes(1, 2, 1, 290, 270, 48, 64)),
    Case("parts_hidden", lambda s: {"attn_mask": (torch.arange(s.query_length)[:, None] // 32 + torch.arange(s.key_length) // 32) % 3 == torch.tensor(1)}, Sizes(1, 1, 1, 130, 205, 64, 40)),
    # A few rows with a few keys, and with the rest of a tile; more of them than share what is loaded.
    Case("decode_few_keys", lambda s: {**_everything(s), "dropout_p": 0.0}, Sizes(query_heads=6, key_heads=2, query_length=2, key_length=19, head_dim=72, value_dim=40)),
    Case("decode_no_keys", lambda s: {"sinks": torch.zeros(s.query_heads, dtype=torch.float64)}, Sizes(query_length=1, key_length=0)),
    Case("decode_square", lambda s: {"causal": True}, Sizes(3, 2, 2, 4, 4, 40, 72)),
    # Few rows of grouped heads, which share blocks on CPUs: masks by row and by head, several blocks, one row a head.
    Case("heads_take_turns", _heads_take_turns, Sizes(query_heads=10, key_heads=2, query_length=5)),
    Case("heads_take_turns_causal", lambda s: {"causal": "lower_right", "attn_mask": _bool_mask(s.query_length, s.key_length)}, Sizes(query_heads=8, key_heads=2, query_length=29, key_length=150)),
    # So many that AMX multiplies float16 in planes.
    Case("many_rows", lambda s: {}, MANY_ROWS),
    Case("many_rows_everything", _everything, MANY_ROWS),
    Case("heads_take_turns_in_parts", lambda s: {"causal": "lower_right", "sinks": torch.randn(s.query_heads, dtype=torch.float64)}, Sizes(1, 9, 1, 2, 1100, 64, 64)),
    Case("many_heads_decode", lambda s: {"attn_mask": _bool_mask(s.query_heads, 1, s.key_length), "key_padding_mask": _bool_mask(s.batch, s.key_length)}, Sizes(query_heads=24, key_heads=2, query_length=1, key_length=301, head_dim=64, value_dim=72)),
    # One tile of rows for a block of keys that some rows see, none for the next, in aligned narrow rows.
    Case("narrow_and_short", lambda s: {"causal": True}, Sizes(1, 2, 1, 25, 129, 16, 8)),
    # Float masks that hide whole tiles, or leave them as they are: by rows, by columns, by sequences.
    Case("float_mask_of_tiles", lambda s: {"attn_mask": _mask_of_tiles(s)}, Sizes(1, 2, 2, 150, 401)),
    Case("float_mask_of_tiles_by_columns", lambda s: {"attn_mask": _mask_of_tiles(s).T.contiguous().T, "softcap": 2.0, "causal": "lower_right"}, Sizes(1, 2, 1, 110, 333)),
    Case("padding_float_of_tiles", lambda s: {"key_padding_mask": _mask_of_lengths(s, float("-inf")), "causal": True}, Sizes(query_length=101, key_length=420)),
    Case("decode_float_mask_of_lengths", lambda s: {"attn_mask": _mask_of_lengths(s, torch.finfo(torch.float32).min)[:, None, None]}, DECODE),
    Case("decode_padding_float", lambda s: {"key_padding_mask": _mask_of_lengths(s, float("-inf"))}, DECODE),
    *(
        Case(f"length_{length}", lambda s: {}, Sizes(1, 2, 2, length, length + 1, 8, 24))
        for length in (11, 12, 13, 23, 24, 25, 47, 48, 49, 63, 64, 65)
    ),
]  # fmt: skip


@dataclasses.dataclass(eq=False)
class Inputs:
    """A case's tensors in one dtype, as leaves that need gradients, and what else it is asked.

    Equal to others that hold the same.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: Options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inputs) and self._digest() == other._digest()

    def __hash__(self) -> int:
        return hash(self._digest())

    def _digest(self) -> str:
        found = hashlib.sha256()
        for name, x in {**vars(self), **self.options}.items():
            if isinstance(x, Tensor):
                kind = (x.dtype, x.device, tuple(x.shape), x.stride(), x.requires_grad)
                found.update(f"{name} {kind}".encode())
                found.update(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
            elif name != "options":
                found.update(f"{name} {x!r}".encode())
        return found.hexdigest()

    @property
    def differentiable(self) -> list[Tensor]:
        mask, sinks = self.options.get("attn_mask"), self.options.get("sinks")
        tensors = [self.query, self.key, self.value]
        tensors += [x for x in (mask, sinks) if x is not None and x.is_floating_point()]
        return tensors

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as leaves of their own."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().to(dtype).requires_grad_()

        options = {name: cast(x) for name, x in self.options.items()}
        for name in ("key_padding_mask", "alibi_slopes"):  # no gradient is asked of these
            if name in options:
                options[name] = options[name].detach()
        return Inputs(cast(self.query), cast(self.key), cast(self.value), options)


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Random inputs of a case, representable in `dtype`."""
    s = case.sizes
    tensors = (
        torch.randn(shape, dtype=torch.float64)
        for shape in (
            (s.batch, s.query_heads, s.query_length, s.head_dim),
            (s.batch, s.key_heads, s.key_length, s.head_dim),
            (s.batch, s.key_heads, s.key_length, s.value_dim),
        )
    )
    return Inputs(*tensors, case.options(s)).to(dtype)


_IN_ONE_PASS = ", in one pass"


def name_in_reference(name: str) -> str:
    """The name of the same result in `run_reference`, which has no kernel for several at once."""
    return name.removesuffix(_IN_ONE_PASS)


def run(inputs: Inputs, backend: str, average: bool = True) -> dict[str, Tensor]:
    """Everything that a backend computes for a problem: both passes of attention and of its weights."""
    query, key, value, options = inputs.query, inputs.key, inputs.value, inputs.options
    out, lse = attn_ext.attention(query, key, value, return_lse=True, backend=backend, **options)
    results = {"out": out, "lse": lse}
    with torch.no_grad():  # inference has a kernel of its own
        results["out alone"] = attn_ext.attention(query, key, value, backend=backend, **options)
        results["out of inference"], results["lse of inference"] = attn_ext.attention(
            query, key, value, return_lse=True, backend=backend, **options
        )
    visible_lse = torch.where(torch.isfinite(lse), lse, 0.0)
    loss = (out.double() * _direction(out)).sum() + (visible_lse.double() * _direction(lse)).sum()
    results.update(_gradients("", loss, inputs.differentiable))
    weights = attn_ext.attention_weights(query, key, lse=lse, average=average, backend=backend, **options)  # fmt: skip
    results["weights"] = weights
    loss = (weights.double() * _direction(weights)).sum()
    gradients = _gradients("weights'", loss, inputs.differentiable)
    gradients.pop("weights' gradient 2", None)  # of value: a kernel's zeros, or none
    results.update(gradients)
    if backend == "cpu":  # which has a kernel for both
        out, weights = attn_ext.attention_and_weights(query, key, value, average=average, backend=backend, **options)  # fmt: skip
        results.update({f"out{_IN_ONE_PASS}": out, f"weights{_IN_ONE_PASS}": weights})
    return {name: tensor.detach() for name, tensor in results.items()}


@functools.lru_cache(maxsize=4)
def run_reference(inputs: Inputs, average: bool = True) -> dict[str, Tensor]:
    """What `run` finds by the reference, which is slower than most backends: once for tests of a
    problem that follow each other, see `pytest_collection_modifyitems`."""
    return run(inputs, "reference", average)


def _gradients(prefix: str, loss: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return {f"{prefix} gradient {i}": g for i, g in enumerate(grads) if g is not None}


def _direction(like: Tensor) -> Tensor:
    """The same random direction for every backend and dtype."""
    generator = torch.Generator().manual_seed(99)
    direction = torch.randn(like.shape, dtype=torch.float64, generator=generator, device="cpu")
    return direction.to(like.device)


def gradients_through_scores(inputs: Inputs, average: bool) -> dict[str, Tensor]:
    """The part of the gradients of weights that does not come through LSE, by the reference."""
    query, key, value, options = inputs.query, inputs.key, inputs.value, inputs.options
    common = {"backend": "reference", **options}
    _, lse = attn_ext.attention(query, key, value, return_lse=True, **common)
    weights = attn_ext.attention_weights(query, key, lse=lse.detach(), average=average, **common)
    loss = (weights.double() * _direction(weights)).sum()
    return _gradients("weights'", loss, inputs.differentiable)


def gradients_from_rounded(
    inputs: Inputs, results: dict[str, Tensor], average: bool
) -> dict[str, Tensor]:
    """The gradients in float64, but from an output and an LSE that were rounded to their dtypes.

    That is all that the contract hands to a backward pass, so no kernel can be closer to the truth; where a
    gradient is a sum that cancels, it shows.
    """
    exact = inputs.to(torch.float64)
    options = dict(exact.options)
    seed, offset = options.pop("seed", 0), options.pop("offset", 0)
    problem = Problem.build(exact.query, exact.key, exact.value, **options)
    problem.seed, problem.offset = seed, offset
    out, lse = results["out"].double(), results["lse"].double()
    scores, visible = reference._scores(problem, False)
    weights = reference._softmax(scores, visible, lse).detach()
    keep = reference._dropped(problem, torch.ones_like(weights))
    group = problem.query_heads // problem.key.shape[1] if problem.key.shape[1] else 1
    value = problem.value.repeat_interleave(group, dim=1)
    finite = torch.isfinite(lse)
    lse = lse.masked_fill(~finite, 0.0)

    def gradients(
        prefix: str, dweights: Tensor, row_term: Tensor, surrogate: Tensor
    ) -> dict[str, Tensor]:
        dscores = (weights * (keep * dweights - row_term[..., None])).masked_fill(~visible, 0.0)
        loss = surrogate + (scores.masked_fill(~visible, 0.0) * dscores.detach()).sum()
        if problem.sinks is not None:
            sinks = torch.exp(problem.sinks.detach()[:, None] - lse) * finite
            loss = loss - (problem.sinks[:, None] * (sinks * row_term).detach()).sum()
        return _gradients(prefix, loss, exact.differentiable)

    dout = _direction(out)
    row_term = (dout * out).sum(-1) - _direction(lse) * finite
    through_value = (((weights * keep) @ value) * dout).sum()
    found = gradients("", dout @ value.detach().transpose(-1, -2), row_term, through_value)
    shape = results["weights"].shape
    dweights = _direction(results["weights"])
    if average and len(shape) == 3:
        dweights = dweights[:, None].expand_as(weights) / max(problem.query_heads, 1)
    row_term = (weights * keep * dweights).sum(-1)
    found.update(gradients("weights'", dweights, row_term, 0.0 * exact.value.sum()))
    return {name: tensor.detach() for name, tensor in found.items()}


def _rounded_at_random(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """To either neighbour, the more probable the nearer it is: stochastic rounding."""
    unit = torch.finfo(dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
    dither = torch.where(torch.isfinite(exact), (torch.rand_like(exact) - 0.5) * unit, 0.0)
    return (exact + dither).to(dtype)


def error_of_other_roundings(
    inputs: Inputs, results: dict[str, Tensor], average: bool, name: str
) -> float:
    """The error of the gradient `name` if output and LSE are rounded in other ways, as a root mean square.

    For a gradient of a single number, where errors that cancel by chance would make its own rounding look
    harmless.
    """
    exact = run_reference(inputs.to(torch.float64), average)
    errors = []
    for _ in range(16):
        rounded = {x: _rounded_at_random(exact[x], results[x].dtype) for x in ("out", "lse")}
        found = gradients_from_rounded(inputs, {**results, **rounded}, average)
        errors.append(error(found[name], exact[name]))
    return statistics.fmean(x * x for x in errors) ** 0.5


def compiled_backward(result: Tensor) -> None:
    """`result.backward()` under compiled autograd, without a graph break."""
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        result.backward()
