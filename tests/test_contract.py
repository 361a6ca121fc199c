"""The contract of every backend, against float64: one suite, run for each of them.

The limit is twice the error that plain PyTorch operations make in the same dtype (or PyTorch's own
kernel, where it can run the problem), plus one rounding of the result. No tolerance is tuned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import interpreted
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    GROUPED,
    SQUARE,
    Case,
    Inputs,
    Sizes,
    error_of_other_roundings,
    gradients_from_rounded,
    gradients_through_scores,
    make_inputs,
    name_in_reference,
    run,
    run_reference,
)
from torch import Tensor

import attn_ext
from attn_ext.benchmark.accuracy import error, rounding_unit

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def assert_contract(inputs: Inputs, dtype: torch.dtype, backend: str, average: bool) -> None:
    """Every result within twice plain PyTorch's error, measured against float64.

    A gradient may also have the error that follows from rounding the output and LSE that it starts from.
    An error is a root mean square, itself uncertain over few elements, which the limit allows for; that of the
    rounding of a single number is taken over several ways to round.
    In float64 itself there is nothing finer to measure against: twice the error that plain PyTorch makes
    in float32, scaled down to float64's precision, stands for its own. A gradient of weights comes there in
    two parts, through the scores and through LSE, that may cancel: the first one's rounding is allowed for.
    """
    actual = run(inputs, backend, average)
    expected = run_reference(inputs.to(torch.float64), average)
    plain, precision = run_reference(inputs, average), 1.0
    truth, parts = expected, {}
    if dtype is torch.float64:
        narrow = inputs.to(torch.float32)
        plain, truth = (
            run_reference(narrow, average),
            run_reference(narrow.to(dtype), average),
        )
        precision = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        parts = gradients_through_scores(inputs, average)
    rounded = gradients_from_rounded(inputs, actual, average)
    assert {name_in_reference(name) for name in actual} == expected.keys()
    for label, tensor in actual.items():
        name = name_in_reference(label)
        kind = torch.float32 if tensor.dtype is torch.float32 else dtype
        assert tensor.dtype == (expected if dtype is torch.float64 else plain)[name].dtype, label
        assert tensor.shape == expected[name].shape, label
        plain_error = precision * error(plain[name], truth[name])
        if name in rounded:
            plain_error = max(plain_error, error(rounded[name], expected[name]))
            if tensor.numel() == 1:
                others = error_of_other_roundings(inputs, actual, average, name)
                plain_error = max(plain_error, others)
        factor = 2 + 8 / max(tensor.numel(), 1) ** 0.5
        limit = factor * plain_error + rounding_unit(expected[name], kind)
        if name in parts:
            limit += rounding_unit(parts[name], kind)
        assert error(tensor, expected[name]) <= limit < math.inf, label


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_in_float32(case: Case, backend: str) -> None:
    assert_contract(make_inputs(case, torch.float32), torch.float32, backend, average=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.name.split("_wide")[0]
        in {
            "plain",
            "everything",
            "head_dim_64",
            "float_mask",
            "rests_of_tiles",
            "narrow_and_short",
            "dropout_of_whole_tiles",
            "many_rows",
            "many_rows_everything",
            "float_mask_of_tiles",
            "decode_float_mask_of_lengths",
        }
    ],
    ids=lambda case: case.name,
)
def test_case_in_other_dtypes(case: Case, dtype: str, backend: str) -> None:
    inputs = make_inputs(case, DTYPES[dtype])
    assert_contract(inputs, DTYPES[dtype], backend, average=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_in_every_dtype(case: Case, dtype: str, average: bool, backend: str) -> None:
    assert_contract(make_inputs(case, DTYPES[dtype]), DTYPES[dtype], backend, average)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [*range(1, 34), 48, 63, 65, 80, 96, 127, 128, 160, 256, 384])
def test_every_head_dim(head_dim: int, backend: str) -> None:
    sizes = Sizes(1, 2, 1, 50, 70, head_dim, head_dim % 7 + head_dim // 2)
    inputs = make_inputs(Case("", lambda s: {"causal": True}, sizes), torch.float32)
    assert_contract(inputs, torch.float32, backend, average=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(120))
def test_random_combinations(seed: int, backend: str) -> None:
    """Options of several cases at once, sizes and dtypes at random."""
    inputs = random_inputs(seed, [*DTYPES.values()])
    assert_contract(inputs, inputs.query.dtype, backend, average=bool(seed % 2))


QUERY_LENGTHS = (1, 2, 12, 25, 48, 70, 131)


def random_inputs(
    seed: int, dtypes: list[torch.dtype], query_lengths: Sequence[int] = QUERY_LENGTHS
) -> Inputs:
    """Not with a handful of keys, where gradients cancel nearly whole: those are cases of their own."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    key_heads = choose.choice([1, 2, 3])
    sizes = Sizes(
        choose.choice([1, 2, 3]),
        key_heads * choose.choice([1, 2, 4]),
        key_heads,
        choose.choice(query_lengths),
        choose.choice([17, 40, 63, 64, 66, 129, 200]),
        choose.choice([1, 7, 16, 40, 64]),
        choose.choice([2, 8, 17, 64]),
    )
    options = {}
    for case in choose.sample(CASES[:37], 3):
        options.update(case.options(sizes))
    return make_inputs(Case("", lambda s: options, sizes), choose.choice(dtypes))


@pytest.mark.parametrize("few_rows", [False, True], ids=["any", "few"])
@pytest.mark.parametrize("seed", range(16))
def test_random_garbage(seed: int, few_rows: bool, backend: str) -> None:
    """NaN or inf in a row of a random problem, or in one number of it, goes no further than in the reference."""
    choose = random.Random(seed)
    lengths = (1, 2, 3) if few_rows else QUERY_LENGTHS
    if backend == "triton" and interpreted.INTERPRETS:  # in small blocks: more rows are minutes
        lengths = tuple(min(length, 70) for length in lengths)
    inputs = random_inputs(1000 + seed, [torch.float32, torch.bfloat16, torch.float16], lengths)
    if few_rows:  # with dropout, the kernels for these are not asked
        inputs.options.pop("dropout_p", None)
    if "alibi_slopes" in inputs.options:  # 2**33 positions apart, float32 has no digits for a score
        inputs.options.update(q_start=0, k_start=0)
    with torch.no_grad():
        tensor = choose.choice([inputs.query, inputs.key, inputs.value])
        place = tensor[choose.randrange(tensor.shape[0]), :, choose.randrange(tensor.shape[2])]
        if choose.random() < 0.5:
            place = place[:, choose.randrange(tensor.shape[3])]
        place.fill_(choose.choice([math.nan, math.inf, -math.inf]))

    actual = run(inputs, backend, average=bool(seed % 2))
    expected = run_reference(inputs.to(torch.float64), average=bool(seed % 2))
    for name, tensor in actual.items():
        exact = expected[name_in_reference(name)]
        finite = torch.isfinite(exact)
        largest = exact[finite].abs().amax().item() if finite.any() else 0.0
        limit = (2e-3 if inputs.query.dtype is torch.float32 else 0.06) * max(largest, 1.0)
        difference = (tensor.double() - exact)[finite].abs()
        assert (difference <= limit).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_error_beside_pytorchs_own_kernel(
    dtype: str, causal: bool, masked: bool, backend: str
) -> None:
    sizes = Sizes(2, 3, 3, 190, 190, 64, 64)
    inputs = make_inputs(Case("", lambda s: {}, sizes), DTYPES[dtype])
    mask = torch.randn(190, 190).to(DTYPES[dtype]) if masked else None
    dout = torch.randn(inputs.query.shape)

    def results(x: Inputs, name: str) -> list[Tensor]:
        kind = x.query.dtype
        m = None if mask is None else mask.to(kind)
        if name == "torch":
            out = F.scaled_dot_product_attention(
                x.query, x.key, x.value, attn_mask=m, is_causal=causal
            )
        else:
            out = attn_ext.attention(
                x.query, x.key, x.value, attn_mask=m, causal=causal, backend=name
            )
        return [out, *torch.autograd.grad(out, [x.query, x.key, x.value], dout.to(kind))]

    expected = results(inputs.to(torch.float64), "reference")
    for ours, theirs, truth in zip(
        results(inputs, backend), results(inputs, "torch"), expected, strict=True
    ):
        assert error(ours, truth) <= 2 * error(theirs, truth) < math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steepness", [0.02, 0.05])
@pytest.mark.parametrize("heads", [1, 3])
def test_scores_that_climb(heads: int, steepness: float, dtype: str, backend: str) -> None:
    """Every tile of keys has a new maximum, by more or by less than what a kernel may put up with.

    With a single head the keys of its few rows are split among threads.
    """
    sizes = (
        Sizes(1, heads, heads, 33, 301, 20, 13) if heads > 1 else Sizes(1, 1, 1, 12, 1100, 20, 13)
    )
    inputs = make_inputs(Case("", lambda s: {"sinks": torch.zeros(heads)}, sizes), DTYPES[dtype])
    with torch.no_grad():
        inputs.query.abs_()
        climb = torch.arange(sizes.key_length)[:, None] * (300 / sizes.key_length)
        inputs.key.mul_(0.1).add_(1).mul_(steepness * climb)
    assert_contract(inputs, DTYPES[dtype], backend, average=True)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual, expected)


def _layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor of shape (2, 3, 37, 10), laid out in memory in several ways."""
    base = torch.randn(2, 3, 37, 10).to(dtype)
    return {
        "contiguous": base,
        "heads inside": base.transpose(1, 2).contiguous().transpose(1, 2),
        "batch inside": base.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "head_dim not contiguous": base.transpose(2, 3).contiguous().transpose(2, 3),
        "inside something larger": torch.nn.functional.pad(base, (3, 4, 1, 2))[..., 1:38, 3:13],
        "every other row": base.repeat_interleave(2, dim=2)[:, :, ::2],
        "broadcast batch": base[:1].expand(2, -1, -1, -1),
    }


@pytest.mark.parametrize("layout", _layouts(torch.float32))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_strides(layout: str, dtype: str, backend: str) -> None:
    query, key, value = (_layouts(DTYPES[dtype])[layout].requires_grad_() for _ in range(3))
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (query, key, value)]  # fmt: skip
    mask = torch.rand(37, 74)[:, ::2] < 0.5
    out = attn_ext.attention(query, key, value, attn_mask=mask, backend=backend)
    same = attn_ext.attention(*copies, attn_mask=mask.contiguous(), backend=backend)
    compare = torch.testing.assert_close if backend == "reference" else assert_equal
    compare(out, same)
    dout = torch.randn(2, 37, 3, 10).to(DTYPES[dtype]).transpose(1, 2)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    for ours, theirs in zip(
        grads, torch.autograd.grad(same, copies, dout.contiguous()), strict=True
    ):
        compare(ours, theirs)


def test_output_lies_in_querys_memory_order(backend: str) -> None:
    query, key, value = torch.randn(3, 2, 19, 4, 8).transpose(2, 3).unbind()
    out = attn_ext.attention(query, key, value, backend=backend)
    if backend != "reference":
        assert out.transpose(1, 2).is_contiguous()


def forward_and_backward(
    tensors: dict[str, Tensor], options: dict[str, object], backend: str
) -> dict[str, Tensor]:
    """Output, LSE and the gradients of query, key and value."""
    out, lse = attn_ext.attention(**tensors, return_lse=True, backend=backend, **options)
    gradients = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    names = ("dquery", "dkey", "dvalue")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=True))}


def assert_untouched(
    clean: dict[str, Tensor],
    dirty: dict[str, Tensor],
    touched_rows: Tensor,
    touched_keys: Tensor,
    **tolerances: float,
) -> None:
    for name, before in clean.items():
        others = ~(touched_keys if name in ("dkey", "dvalue") else touched_rows)
        torch.testing.assert_close(
            dirty[name][:, :, others],
            before[:, :, others],
            msg=lambda text, name=name: f"{name}: {text}",
            **tolerances,
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("hide", ["causal", "mask", "padding", "float_mask", "float16_mask"])
def test_garbage_reaches_only_rows_that_see_it(
    bad: float, where: str, hide: str, backend: str
) -> None:
    """Forward and backward, with the garbage in key 70 (or row 70): its own tile is an edge."""
    sizes = Sizes(1, 2, 1, 97, 97)
    dtype = torch.float16 if hide == "float16_mask" else torch.float32
    inputs = make_inputs(Case("", lambda s: {}, sizes), dtype)
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    options: dict[str, object] = {"causal": True}
    if hide != "causal":
        visible = torch.rand(97, 97) < 0.6
        visible[:, 70] = torch.arange(97) % 5 == 0
        options = {"attn_mask": visible}
        if hide in ("float_mask", "float16_mask"):
            mask = torch.zeros(97, 97, dtype=dtype).masked_fill(~visible, float("-inf"))
            options = {"attn_mask": mask}
        if hide == "padding":
            options = {"key_padding_mask": (torch.arange(97) != 70)[None]}
    seen = (
        attn_ext.attention_weights(
            inputs.query, inputs.key, average=False, backend="reference", **options
        ).detach()[0, 0]
        > 0
    )

    clean = forward_and_backward(tensors, options, backend)
    with torch.no_grad():
        tensors[where][:, :, 70] = bad
    dirty = forward_and_backward(tensors, options, backend)
    touched_rows = seen[:, 70] if where != "query" else torch.arange(97) == 70
    # A row that sees garbage passes it to every key that it sees, and to no other key.
    touched_keys = seen[touched_rows].any(dim=0)
    tolerances = {"rtol": 0.01, "atol": 0.002} if dtype is torch.float16 else {}
    assert_untouched(clean, dirty, touched_rows, touched_keys, **tolerances)
    if where == "value" or bad != bad:
        assert not torch.isfinite(dirty["out"][:, :, touched_rows]).any()


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize(
    "hide", ["window", "next_key", "blocks", "float_blocks", "softcap", "mask_gradient"]
)
@pytest.mark.parametrize("length", [128, 147])
def test_garbage_in_bfloat16_stays_where_it_is_seen(
    where: str, hide: str, length: int, backend: str
) -> None:
    """Where products go in blocks of rows and keys that a row sees nothing of, and rows end inside of one.

    A row that saw garbage has no LSE, in whichever tile it was.
    """
    place = 60  # a window reaches from its tile of 64 keys into the next
    if hide == "next_key":
        place = 83  # next to the last key that a block of rows 32 to 79 sees
    rows, keys = torch.arange(length)[:, None], torch.arange(length)
    seen = rows // 32 == keys // 32
    if hide not in ("blocks", "float_blocks"):
        seen &= keys != 5
    options: dict[str, object] = {"attn_mask": seen}
    if hide == "window":
        seen, options = (keys <= rows) & (keys >= rows - 10), {"causal": True, "window": (10, 0)}
    if hide == "next_key":
        seen, options = (keys <= rows + 3) & (keys >= rows - 40), {"window": (40, 3)}
    if hide == "softcap":
        options["softcap"] = 5.0
    if hide in ("float_blocks", "mask_gradient"):
        mask = torch.zeros(length, length, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
        options["attn_mask"] = mask.requires_grad_(hide == "mask_gradient")
    inputs = make_inputs(
        Case("", lambda s: {}, Sizes(1, 2, 1, length, length, 64, 64)), torch.bfloat16
    )
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}

    clean = forward_and_backward(tensors, options, backend)
    with torch.no_grad():
        tensors[where][:, :, place] = float("nan")
        if hide not in ("blocks", "float_blocks"):
            tensors["value"][:, :, 5] = float("nan")  # nobody sees it, but with a window
    dirty = forward_and_backward(tensors, options, backend)
    bad_keys = torch.zeros(length, dtype=torch.bool)
    bad_keys[5] = hide not in ("blocks", "float_blocks")
    bad_keys[place] = where != "query"
    touched_rows = (seen & bad_keys).any(dim=1)
    touched_rows[place] |= where == "query"
    touched_keys = seen[touched_rows].any(dim=0)
    # Where something hidden is not finite, weights may stay as exact as they are.
    assert_untouched(clean, dirty, touched_rows, touched_keys, rtol=0.02, atol=0.02)


def test_missing_rows_of_infinite_keys(backend: str) -> None:
    """A key of -inf, which every row of positive queries ignores: so do rows that fill up a block."""
    tensors = [torch.rand(1, 2, n, 64, dtype=torch.bfloat16) for n in (19, 64, 64)]
    tensors[1][:, :, 5, 3] = float("-inf")
    tensors = [x.requires_grad_() for x in tensors]
    out = attn_ext.attention(*tensors, backend=backend)
    _, dkey, dvalue = torch.autograd.grad(out, tensors, torch.ones_like(out))
    for gradient in (dkey, dvalue):
        assert (gradient[:, :, 5] == 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key"])
def test_inf_that_rows_see(where: str, bad: float, backend: str) -> None:
    """A score of -inf hides a key, one of inf makes the row NaN."""
    inputs = make_inputs(Case("", lambda s: {}, SQUARE), torch.float32)
    tensors = [x.detach().clone() for x in (inputs.query, inputs.key, inputs.value)]
    tensors[where == "key"][:, :, 70, 5] = bad

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        query, key, value = (x.to(dtype) for x in tensors)
        out, lse = attn_ext.attention(query, key, value, return_lse=True, backend=backend)
        weights = attn_ext.attention_weights(query, key, average=False, backend=backend)
        both = attn_ext.attention_and_weights(query, key, value, average=False, backend=backend)
        return [out, lse, weights, *both]

    ours, exact = results(torch.float32, backend), results(torch.float64, "reference")
    names = ("out", "lse", "weights", "out of both", "weights of both")
    for name, x, y in zip(names, ours, exact, strict=True):
        assert torch.isfinite(y).any() or where == "query", name
        assert error(x, y) < 1e-6, name


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
def test_inf_that_is_dropped(bad: float, backend: str) -> None:
    """Dropout acts on weights: an infinite score has its place in LSE before, dropped or not."""
    sizes = Sizes(1, 8, 1, 60, 70, 16, 8)
    inputs = make_inputs(Case("", lambda s: {}, sizes), torch.float32)
    query, key, value = (x.detach() for x in (inputs.query, inputs.key, inputs.value))
    query[..., 3], key[:, :, 30, 3] = 1.0, bad

    def results(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        tensors = [x.to(dtype) for x in (query, key, value)]
        return attn_ext.attention(*tensors, dropout_p=0.5, seed=3, return_lse=True, backend=backend)

    (out, lse), (exact, exact_lse) = (
        results(torch.float32, backend),
        results(torch.float64, "reference"),
    )
    assert error(lse, exact_lse) < 1e-6
    assert error(out, exact) < 1e-6


@pytest.mark.parametrize("forbidding", [False, -math.inf, torch.finfo(torch.float32).min])
def test_rows_without_keys(forbidding: bool | float, backend: str) -> None:
    """Output 0, LSE -inf, gradient 0; and the other rows do not notice."""
    inputs = make_inputs(Case("", lambda s: {}, SQUARE), torch.float32)
    mask = torch.rand(97, 97) < 0.5
    mask[[3, 48, 96]] = False
    if forbidding is not False:
        mask = torch.zeros(97, 97).masked_fill(~mask, forbidding)
    out, lse = attn_ext.attention(
        inputs.query, inputs.key, inputs.value, attn_mask=mask, return_lse=True, backend=backend
    )
    assert (out[:, :, [3, 48, 96]] == 0).all()
    assert (lse[:, :, [3, 48, 96]] == float("-inf")).all()
    loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
    grads = torch.autograd.grad(loss, inputs.differentiable)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :, [3, 48, 96]] == 0).all()
    weights = attn_ext.attention_weights(inputs.query, inputs.key, attn_mask=mask, backend=backend)
    both = attn_ext.attention_and_weights(
        inputs.query, inputs.key, inputs.value, attn_mask=mask, backend=backend
    )
    assert all((x[:, [3, 48, 96]] == 0).all() for x in (weights, both[1]))


def test_rows_that_see_low_scores_late(backend: str) -> None:
    """Maxima are -inf at first, then so low that what takes weights from one to the other overflows."""
    inputs = make_inputs(Case("", lambda s: {}, Sizes(1, 2, 2, 50, 300, 8, 8)), torch.float32)
    mask = torch.full((50, 300), -4000.0)
    mask[:, :260] = -math.inf
    mask[3], mask[5], mask[7, 270] = -math.inf, 0.0, 4000.0

    def results(dtype: torch.dtype, backend: str) -> Sequence[Tensor]:
        tensors = [x.detach().to(dtype) for x in (inputs.query, inputs.key, inputs.value)]
        options = {"attn_mask": mask.to(dtype), "average": False, "backend": backend}
        return attn_ext.attention_and_weights(*tensors, **options)

    ours, exact = results(torch.float32, backend), results(torch.float64, "reference")
    for x, y in zip(ours, exact, strict=True):
        assert error(x, y) < 1e-3


@pytest.mark.parametrize("keys", [1, 3, 129])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_scores_of_an_odd_number_of_keys(dtype: str, keys: int, backend: str) -> None:
    """A key that fills up a pair has a product of 0, which is more than any of these."""
    query = torch.ones(1, 1, 40, 16, dtype=DTYPES[dtype])
    key = torch.full((1, 1, keys, 16), -30.0, dtype=DTYPES[dtype])
    value = torch.ones_like(key)
    out, lse = attn_ext.attention(query, key, value, return_lse=True, backend=backend)
    weights = attn_ext.attention_weights(query, key, backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0.01, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(keys) - 120), rtol=1e-3, atol=0)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / keys), rtol=0.01, atol=0)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize(
    ("query_length", "key_length", "shape"),
    [(0, 3, (1, 1, 1, 3)), (2, 0, (2, 1)), (0, 0, (2, 1, 1)), (2, 3, (0, 1, 1, 3))],
)
def test_gradient_of_a_mask_of_no_pairs(
    query_length: int, key_length: int, shape: tuple[int, ...], backend: str
) -> None:
    batch = 0 if 0 in shape else 1
    query, key = torch.randn(batch, 2, query_length, 16), torch.randn(batch, 2, key_length, 16)
    mask = torch.zeros(shape, requires_grad=True)
    out = attn_ext.attention(query, key, key, attn_mask=mask, backend=backend)
    weights = attn_ext.attention_weights(query, key, attn_mask=mask, backend=backend)
    for result in (out, weights):
        (grad,) = torch.autograd.grad(result.sum(), mask)
        assert torch.equal(grad, torch.zeros(shape))


def test_a_sink_of_minus_infinity(backend: str) -> None:
    """It takes no part, where rows see nothing else either."""
    mask = torch.tensor([[False] * 3, [True] * 3])
    query, key = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 3, 16)
    sinks = torch.tensor([-math.inf, 0.5], requires_grad=True)
    out, lse = attn_ext.attention(
        query, key, key, attn_mask=mask, sinks=sinks, return_lse=True, backend=backend
    )
    (grad,) = torch.autograd.grad(out.sum() + lse[:, 1].sum(), sinks)
    assert grad[0] == 0
    assert torch.isfinite(grad[1])
    assert grad[1] != 0


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    ("dtype", "lowest"),
    [
        ("float64", torch.float32),
        ("float32", torch.float32),
        ("float32", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float32),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_lowest_numbers_forbid(dtype: str, lowest: torch.dtype, rows: int, backend: str) -> None:
    """In a mask they do as -inf does, forward and backward, in rows of nothing else too."""
    inputs = make_inputs(Case("", lambda s: {}, Sizes(query_length=rows)), DTYPES[dtype])
    forbidden, padding = torch.rand(rows, 83) < 0.3, torch.rand(2, 83) < 0.3
    forbidden[1] = True

    def results(entry: float) -> list[Tensor]:
        holds = torch.promote_types(lowest, DTYPES[dtype])
        mask = torch.zeros(rows, 83, dtype=holds).masked_fill(forbidden, entry).requires_grad_()
        padding_mask = torch.zeros(2, 83, dtype=holds).masked_fill(padding, entry)
        out, lse = attn_ext.attention(
            inputs.query, inputs.key, inputs.value, attn_mask=mask, key_padding_mask=padding_mask,
            return_lse=True, backend=backend,
        )  # fmt: skip
        weights = attn_ext.attention_weights(
            inputs.query, inputs.key, attn_mask=mask, key_padding_mask=padding_mask, backend=backend
        )
        loss = out.float().square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
        loss = loss + weights.float().square().sum()
        return [out, lse, weights, *torch.autograd.grad(loss, (*inputs.differentiable, mask))]

    expected = results(-math.inf)
    assert (expected[0][:, :, 1] == 0).all()
    for found, result in zip(results(torch.finfo(lowest).min), expected, strict=True):
        assert torch.equal(found, result)


@pytest.mark.parametrize("dropout_p", [0.4, 1e-3, 0.998])
def test_dropout_is_the_same_everywhere(dropout_p: float, backend: str) -> None:
    """The very weights that the generator names are dropped, in both passes and at any cut."""
    from attn_ext.philox import keep_mask

    query, key = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 70, 8)
    settings = {"dropout_p": dropout_p, "seed": 12345, "offset": 9, "backend": backend}
    weights = attn_ext.attention_weights(query, key, average=False, **settings)
    kept = keep_mask((2, 3, 50, 70), dropout_p, 12345, 9)
    assert torch.equal(weights != 0, kept)
    # Rows and keys cut out and placed by their absolute positions: within tiles, and at their edges.
    for row, column in ((20, 30), (16, 32), (5, 64), (32, 16)):
        part = attn_ext.attention_weights(
            query[:, :, row:], key[:, :, column:], average=False, q_start=row, k_start=column, **settings
        )  # fmt: skip
        assert torch.equal(part != 0, kept[:, :, row:, column:])
    # Positions count in 32 bits, and start again.
    far = {"q_start": 2**32 - 32, "k_start": 2**32 - 64}
    part = attn_ext.attention_weights(query, key, average=False, **far, **settings)
    assert torch.equal(part != 0, keep_mask((2, 3, 50, 70), dropout_p, 12345, 9, **far))
    # With keys and values that pick out weights, the outputs are those weights.
    value = torch.eye(70).expand(2, 3, 70, 70)
    for row, column in ((0, 0), (16, 32), (3, 0)):
        out = attn_ext.attention(
            query[:, :, row:], key[:, :, column:], value[:, :, column:], q_start=row, k_start=column, **settings
        )  # fmt: skip
        assert torch.equal(out[..., column:] != 0, kept[:, :, row:, column:])


@pytest.mark.parametrize("average", [False, True])
def test_weights_are_the_ones_used(average: bool, backend: str) -> None:
    inputs = make_inputs(Case("", lambda s: {}, GROUPED), torch.float32)
    settings = {"dropout_p": 0.3, "seed": 4, "softcap": 2.0, "causal": "lower_right"}
    out, lse = attn_ext.attention(
        inputs.query, inputs.key, inputs.value, return_lse=True, backend=backend, **settings
    )
    weights = attn_ext.attention_weights(
        inputs.query, inputs.key, lse=lse, average=average, backend=backend, **settings
    )
    if average:
        single = attn_ext.attention_weights(
            inputs.query, inputs.key, average=False, backend=backend, **settings
        )
        torch.testing.assert_close(weights, single.mean(dim=1))
    else:
        value = inputs.value.repeat_interleave(3, dim=1)
        torch.testing.assert_close(weights @ value, out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lse", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_weights_from_any_lse(lse: float, backend: str) -> None:
    """exp(s - lse) also where that is no softmax: inf where it overflows, 0 where it vanishes."""
    query, key = torch.randn(1, 2, 33, 8), torch.randn(1, 2, 20, 8)
    weights = attn_ext.attention_weights(
        query, key, lse=torch.full((1, 2, 33), lse), average=False, backend=backend
    )
    scores = query.double() @ key.double().transpose(2, 3) / 8**0.5
    torch.testing.assert_close(weights, (scores - lse).exp().float(), atol=1e-37, rtol=1e-4)


def test_backward_is_deterministic(backend: str) -> None:
    case = next(case for case in CASES if case.name == "everything")
    inputs = make_inputs(case, torch.float32)
    first, second = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [
        *((dtype, "float32") for dtype in ("bfloat16", "float16", "float32")),
        *((dtype, dtype) for dtype in ("bfloat16", "float16", "float64")),
    ],
)
def test_mask_dtypes(dtype: str, mask_dtype: str, backend: str) -> None:
    sizes = Sizes(2, 3, 3, 21, 34, 8, 9)
    mask = torch.randn(21, 34).to(DTYPES[mask_dtype]).requires_grad_()
    inputs = make_inputs(Case("", lambda s: {}, sizes), DTYPES[dtype])
    out = attn_ext.attention(
        inputs.query, inputs.key, inputs.value, attn_mask=mask, backend=backend
    )
    (grad,) = torch.autograd.grad(out.double().square().sum(), mask)
    assert grad.dtype == mask.dtype
    exact = inputs.to(torch.float64)
    wide = mask.detach().double().requires_grad_()
    truth = attn_ext.attention(
        exact.query, exact.key, exact.value, attn_mask=wide, backend="reference"
    )
    (expected,) = torch.autograd.grad(truth.square().sum(), wide)
    tolerance = 20 * torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(grad.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(3, 61, 1), (2, 1, 61, 1), (3, 1, 1), (1,)])
def test_mask_without_a_key_dimension(shape: tuple[int, ...], backend: str) -> None:
    """Its gradient is a sum over whole rows, where nearly everything cancels: compared in absolute size."""
    case = Case("", lambda s: {"sinks": torch.randn(s.query_heads, dtype=torch.float64)})
    inputs = make_inputs(case, torch.float32)
    inputs.options["attn_mask"] = torch.randn(shape).requires_grad_()
    actual, expected = run(inputs, backend), run_reference(inputs.to(torch.float64))
    for name, tensor in actual.items():
        terms = 61 * 83 * 6 / inputs.options["attn_mask"].numel() if "gradient 3" in name else 83
        tolerance = torch.finfo(torch.float32).eps * terms
        truth = expected[name_in_reference(name)]
        torch.testing.assert_close(tensor.double(), truth, atol=tolerance, rtol=1e-5)


GRADCHECK_OPTIONS = {
    "plain": {},
    "masks": {"attn_mask": "float", "key_padding_mask": torch.tensor([[True, False, True, True, True]])},
    "dropout": {"dropout_p": 0.3, "seed": 3},
    "sinks": {"sinks": torch.tensor([0.3, -0.2], dtype=torch.float64), "causal": "lower_right"},
    "window": {"window": (1, 1), "softcap": 1.3, "alibi_slopes": torch.tensor([0.5, 0.25])},
}  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECK_OPTIONS)
def test_gradients_of_both_orders(name: str, backend: str) -> None:
    device = torch.get_default_device()
    options = {
        name: x.to(device) if isinstance(x, Tensor) else x
        for name, x in GRADCHECK_OPTIONS[name].items()
    }
    tensors = [torch.randn(1, heads, length, dim, dtype=torch.float64, requires_grad=True)
               for heads, length, dim in ((2, 3, 4), (1, 5, 4), (1, 5, 2))]  # fmt: skip
    extra = [options.pop("sinks")] if "sinks" in options else []
    if options.get("attn_mask") == "float":
        options.pop("attn_mask")
        mask = torch.randn(2, 3, 5, dtype=torch.float64)
        tensors.append(mask.requires_grad_())
    tensors += [x.clone().requires_grad_() for x in extra]

    def function(query: Tensor, key: Tensor, value: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(["sinks" if extra else "attn_mask"], more, strict=False))
        out, lse = attn_ext.attention(
            query, key, value, return_lse=True, backend=backend, **named, **options
        )
        weights = attn_ext.attention_weights(query, key, backend=backend, **named, **options)
        return out, lse, weights

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
