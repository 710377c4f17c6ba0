"""What classes call the cache that they are handed: transformers up to 5.23, from 5.24 on, and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3ForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from tensorcast.modeling.attention import cache_argument
from tensorcast.modeling.experts import NAME
from tensorcast.trace.forward import record_step


def _older(self: Any, input_ids: Any, past_key_values: Any = None) -> None: ...
def _newer(self: Any, input_ids: Any, cache=None) -> None: ...  # type: ignore[no-untyped-def]
def _states(self: Any, input_ids: Any, cache=None) -> None: ...  # type: ignore[no-untyped-def]
def _typed(self: Any, input_ids: Any, cache=None) -> None: ...  # type: ignore[no-untyped-def]
def _tuple(self: Any, input_ids: Any, cache=None) -> None: ...  # type: ignore[no-untyped-def]
def _none(self: Any, input_ids: Any, cache_params: Any = None) -> None: ...


_states.__annotations__["cache"] = dict[str, torch.Tensor] | None  # XLM's
_tuple.__annotations__["cache"] = tuple[tuple[torch.Tensor]] | None  # BertGeneration's still say so
_typed.__annotations__["cache"] = DynamicCache | None  # MiniMax's is a class of its own


@pytest.mark.parametrize(
    ("forward", "name"),
    [(_older, "past_key_values"), (_newer, "cache"), (_typed, "cache"), (_tuple, "cache"), (_states, ""), (_none, "")],
)
def test_the_argument_is_told_by_the_signature(forward: Any, name: str) -> None:
    assert cache_argument(forward) == name


class _Renamed(Qwen3ForCausalLM):
    """The class as the other release would have it."""

    def forward(self, input_ids: Any, cache: Any = None, logits_to_keep: int = 0, **given: Any) -> Any:
        given[cache_argument(Qwen3ForCausalLM.forward)] = cache
        return super().forward(input_ids, logits_to_keep=logits_to_keep, **given)


_Renamed.forward.__annotations__["cache"] = Cache | None


def test_a_class_of_either_release_records_the_same_step() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("qwen3", vocab_size=512, num_key_value_heads=2, head_dim=16, **sizes)
    found = []
    for kind in (Qwen3ForCausalLM, _Renamed):
        with torch.device("meta"):
            model = kind._from_config(config, attn_implementation=NAME)
        calls = record_step(model, config, batch=2, new=3, past=5, recurrent_state=False)
        found.append([(call.name, [t.shape for t in call.inputs], call.attrs) for call in calls])
    assert found[0] == found[1]
    assert sum(name == "kv_cache_write" for name, _, _ in found[1]) == 2
