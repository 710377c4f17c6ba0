#!/usr/bin/env bash
# A model class holds matrices for experts that compute nothing.
#
# Packages: transformers 5.23.0, torch 2.13.0 (CPU).
# Guess: experts that return their input have no weights, so a model's class holds what its checkpoint holds.
# Seen: LongCat-Flash's experts at the class's own sizes (512 routed, 256 that return their input) hold a first matrix for
# all 768 and a second one for 512; changing the 256 changes nothing. Over 28 layers that is 180 billion parameters beside
# the 560 billion of the published model: whoever sizes memory by the class on meta plans a third too much.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

config = LongcatFlashConfig()
with torch.device("meta"):
    experts = LongcatFlashExperts(config)
first, second = experts.gate_up_proj.shape, experts.down_proj.shape
idle = (first[0] - second[0]) * first[1] * first[2]
print(f"transformers {transformers.__version__}: first matrix {list(first)}, second {list(second)}")
print(f"without a counterpart: {idle / 1e9:.2f} billion parameters per layer, {28 * idle / 1e9:.0f} over 28 layers")
assert (first[0], second[0]) == (config.n_routed_experts + config.zero_expert_num, config.n_routed_experts)
assert round(28 * idle / 1e9) == 180

torch.manual_seed(0)
small = LongcatFlashConfig(n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=8, hidden_size=16)
tried = LongcatFlashExperts(small)
for weight in tried.parameters():
    torch.nn.init.normal_(weight)
rows, chosen, weights = torch.randn(12, 16), torch.randint(0, 6, (12, 2)), torch.rand(12, 2)
with torch.no_grad():
    before = tried(rows, chosen, weights)
    tried.gate_up_proj[4:] += 1.0
    same = torch.equal(before, tried(rows, chosen, weights))
    tried.gate_up_proj[:4] += 1.0
    other = torch.equal(before, tried(rows, chosen, weights))
print(f"output unchanged by the idle matrices: {same}; by the others: {other}")
assert same and not other
PY
