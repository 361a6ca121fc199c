"""Fused, exact softmax attention for PyTorch.

`attention` is the function with everything in it; `scaled_dot_product_attention` and
`MultiheadAttention` are drop-in replacements for PyTorch's. See README.md for the API on one page.
"""

from attn_ext._version import __version__
from attn_ext.dispatch import BACKENDS, Explanation, ReferenceFallbackWarning, use_backend
from attn_ext.functional import (
    attention,
    attention_and_weights,
    attention_weights,
    explain,
    scaled_dot_product_attention,
)
from attn_ext.multihead import MultiheadAttention, multi_head_attention_forward
from attn_ext.replacement import replace_multihead_attention, restore_multihead_attention

__all__ = [
    "BACKENDS",
    "Explanation",
    "__version__",
    "MultiheadAttention",
    "ReferenceFallbackWarning",
    "attention",
    "attention_and_weights",
    "attention_weights",
    "explain",
    "multi_head_attention_forward",
    "replace_multihead_attention",
    "restore_multihead_attention",
    "scaled_dot_product_attention",
    "use_backend",
]
