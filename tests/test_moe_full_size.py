"""Every shipped MoE profile at full size, on meta: the rewritten block of every rank of two layouts. Slow: minutes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tensorcast.errors import InputError
from tensorcast.modeling.build import causal_lm
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.moe.apply import moe_blocks
from tensorcast.modeling.moe.groups import MoEGroups
from tensorcast.modeling.moe.reading.fields import at
from tensorcast.modeling.moe.rewrite import prove, rewrite
from tensorcast.profiles.store import list_models, load_model
from tensorcast.validate.run import cut

MOE = [name for name in list_models() if load_model(name).num_experts]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "dp", "ep"), [(8, 1, 8), (1, 32, 32)])
@pytest.mark.parametrize("name", MOE)
def test_ranks_hold_all_experts_once(name: str, tp: int, dp: int, ep: int) -> None:
    profile = cut(load_model(name), 4)
    with torch.device("meta"):
        model = causal_lm(hf_config(profile), torch.bfloat16)
    block = list(moe_blocks(model, profile.moe))[-1][1]
    kept = prove(block, profile.moe, name).kept
    experts = load_model(name).num_experts
    held = 0
    for rank in range(tp * dp):
        own = copy.copy(block)
        own._modules = dict(block._modules)
        groups = MoEGroups.of(tp, dp, ep, rank)
        if ep > experts:
            with pytest.raises(InputError, match=str(ep)):
                rewrite(own, groups, fields=profile.moe, model=name)
            return
        block_of_rank: Any = rewrite(own, groups, fields=profile.moe, model=name)
        rewritten: Any = at(block_of_rank, kept) if kept else block_of_rank
        held += rewritten.layer.experts.count
    assert held == experts
