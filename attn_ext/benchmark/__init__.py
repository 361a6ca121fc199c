"""What `attn-ext check` and `attn-ext bench` run, and what bench/ measures with.

    cases      what is measured: kinds of work, shapes, inputs, operations and bytes
    sides      who does it: the backends of attn_ext, PyTorch's own kernels, other packages
    accuracy   errors, and their limit
    check      every backend against float64
    measure    interleaved rounds
    memory     peak memory
    peak       the machine's limits, measured
    run        measures a case on all sides
    scaling    exponents of time and memory in L, B, H and D
    results    what was measured, as JSON and as tables
    plots, page  the HTML report

Nothing else in attn_ext imports it. `check` needs torch alone; tables and the progress bar need
rich, plots matplotlib: `pip install 'attn-ext[bench]'`.
"""
