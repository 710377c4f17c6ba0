"""No op and no kernel family can have two formulas."""

from __future__ import annotations

import pytest

from tensorcast.cost.formulas import FORMULAS, traffic
from tensorcast.cost.kernels.formula import WORKS
from tensorcast.cost.kernels.vocabulary import SIZES


def test_an_op_with_a_formula_takes_no_second_one() -> None:
    before = dict(FORMULAS)
    with pytest.raises(ValueError, match="'embedding' is registered already"):
        FORMULAS["embedding"] = traffic
    assert dict(FORMULAS) == before


def test_a_kernel_family_takes_no_second_formula() -> None:
    gemm = WORKS["gemm"]
    with pytest.raises(ValueError, match="'gemm'"):
        WORKS["gemm"] = WORKS["quantize"]
    assert WORKS["gemm"] is gemm
    assert WORKS.keys() <= SIZES.keys()
