#!/usr/bin/env bash
# A model takes an experts implementation by name though none of its experts would ever run it.
#
# Packages: transformers 5.23.0, torch 2.13.0 (CPU).
# Guess: set_experts_implementation refuses, or warns, where a model's experts are outside the experts interface.
# Seen: Llama-4's text model takes the name of a registered implementation without an error or a warning; its config keeps
# saying eager and its forward pass never calls it. Mixtral's does at once. Whoever times "the grouped backend" on Llama-4
# this way times its dense loop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
"$folder/venv/bin/python" - <<'PY'
import logging

import torch
import transformers
from transformers import AutoModelForCausalLM, Llama4TextConfig, MixtralConfig
from transformers.integrations.moe import ExpertsInterface

called, said = [], []


def counted(self, x, index, weights, *more, **named):
    called.append(type(self).__name__)
    return torch.zeros_like(x)


class Heard(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


ExpertsInterface.register("counted", counted)
logging.getLogger("transformers").addHandler(Heard())
common = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
found = {}
for config in (
    MixtralConfig(**common, intermediate_size=48, num_local_experts=4),
    Llama4TextConfig(**common, intermediate_size=48, intermediate_size_mlp=48, num_local_experts=4, head_dim=8,
                     num_experts_per_tok=1),
):
    model = AutoModelForCausalLM.from_config(config).eval()
    called.clear(), said.clear()
    model.set_experts_implementation("counted")
    with torch.no_grad():
        model(torch.arange(8)[None])
    told = any("experts" in text for text in said)
    found[config.model_type] = (model.config._experts_implementation, len(called) > 0, told)
    print(f"{config.model_type}: config says {found[config.model_type][0]!r}, called: {len(called) > 0}, warned: {told}")
assert transformers.__version__ == "5.23.0"
assert found["mixtral"] == ("counted", True, False) and found["llama4_text"] == ("eager", False, False), found
PY
