"""torch.compile and torch.export take the rewritten layer in one graph, on one rank and on two, and it stays equal."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path

import moe_compile
import pytest
import torch
from moe_blocks import block_of, error, output_of
from moe_compile import COMPILED, DTYPES, RANK_CASES, two_ranks, worst

from tensorcast.modeling.moe.parallel import MoEOptions
from tensorcast.modeling.moe.phase import in_phase
from tensorcast.modeling.moe.rewrite import rewrite

EVERY = list(product(COMPILED, DTYPES))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", module="torch")


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
def test_one_graph_for_all_batches_and_an_exported_program(backend: str, dtype: str) -> None:
    assert worst(backend, dtype, "aot_eager") < 1
    assert worst(backend, dtype, "export") < 1


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), EVERY)
def test_inductor(backend: str, dtype: str) -> None:
    assert worst(backend, dtype, "inductor") < 1


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_in_one_graph_each(every: bool, tmp_path: Path) -> None:
    """Rows that travel are as many as there are, not as many as balanced routing would send."""
    kept = {"grouped_mm", "masked"}
    cases = [one for one in RANK_CASES if every or (one[-1] == "fp32" and one[-2] in kept)]
    for one, found in zip(cases, two_ranks(tmp_path, cases), strict=True):
        assert found < 1, one


def test_a_phase_chooses_another_graph() -> None:
    """What in_phase says is guarded on: the same compiled layer runs the other backend when the phase changes."""
    torch._dynamo.reset()
    block, x = block_of("mixtral"), torch.randn(2, 5, 64)
    layer = rewrite(block, options=MoEOptions(backend="grouped_mm,decode=masked"))
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    run = torch.compile(layer, fullgraph=True, backend=keep)
    with torch.no_grad():
        for phase in ("prefill", "decode", "prefill"):
            with in_phase(phase):
                assert error(run(x), output_of(block, x)) < 1e-6
    assert ["masked_grouped_matmul" in graph for graph in graphs] == [False, True]


def test_the_table_in_the_docs_has_every_backend_and_dtype() -> None:
    """Made by ``make compiled``; what it says is what the tests above find."""
    page = (Path(__file__).parent.parent / "docs" / "moe.md").read_text("utf-8")
    assert moe_compile.HEAD in page
    for backend, dtype in EVERY:
        assert f"| `{backend}` | {dtype} | yes | yes | yes | yes |" in page
