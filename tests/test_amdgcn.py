"""bench.amdgcn on an assembly with a known control flow."""

from __future__ import annotations

import pytest

from bench import amdgcn

# Two loops over tiles: one with a way round a part of it, and one whose tail lies behind the end.
KERNEL = """\
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	.text
	.globl	forward
forward:                                ; @forward
; %bb.0:
	s_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15] ; tile
	s_cbranch_scc0 .LBB0_3
; %bb.2:
	v_exp_f32_e32 v1, v1
	scratch_store_dword off, v1, s32
.LBB0_3:
	s_nop 4
	v_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_vccnz .LBB0_1
.LBB0_4:
	v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
	v_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]
	s_cbranch_scc1 .LBB0_6
; %bb.5:
	s_endpgm
.LBB0_6:
	v_add_u32_e32 v1, 1, v1
	v_add_u32_e32 v1, 2, v1
	s_branch .LBB0_4
.Lfunc_end0:
	.section	.rodata
	.amdhsa_kernel forward
	v_no_instruction_any_more v0
"""


def test_loops_of_a_kernel() -> None:
    function = amdgcn.function(KERNEL)
    assert (function.name, function.architecture) == ("forward", "gfx942")
    assert len(function.instructions) == 15
    full, edge = function.main_loops()
    assert (full.body.instructions, full.hot_path.instructions) == (6, 4)
    # In units of 16 x 8 x 16 multiply-adds.
    assert full.body.matrix_work == 2 * 32 * 32 * 8 / 2048
    assert full.body.units["local memory"] == 1
    assert (edge.body.instructions, edge.body.matrix_work) == (6, 4.0)


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="amdhsa_kernel"):
        amdgcn.function("\tv_nop\n")
