"""Small real programs that use `attn_ext`."""
