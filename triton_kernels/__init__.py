"""The Triton kernels, installed as `attn_ext.triton_kernels`.

Vocabulary first: `arguments` (what kernels take), `scores` (from products to scores and weights),
`gradients`, `dropout`. Then a kernel a file: `forward`, `row_terms`, `backward_queries`,
`backward_keys`, `mask_gradient`, `weights`. `configurations` has the block sizes, and `launch`
makes a kernel's call of a problem.

A kernel is compiled once for each combination of what is given and what is not: an argument that
is None is a constant, and the code for it does not exist.
"""
