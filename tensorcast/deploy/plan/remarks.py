"""What a price leaves out that a reader should know: matrices that are not cut, precisions that nothing counts."""

from __future__ import annotations

from tensorcast.modeling.quantization import Quantization
from tensorcast.profiles.config_values import text_of
from tensorcast.profiles.device import DeviceProfile
from tensorcast.profiles.engine import EngineProfile
from tensorcast.profiles.memory import is_latent
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.table import DTYPE_BYTES, OpTable, per_table

UNCUT_SAID = 0.2
"""Share of the linear weights from which uncut ones are spoken of: what engines leave whole, too (down-projections of
latent attention, indexers), is less."""

WHOLE = ("pre_expert_proj", "post_expert_proj")
"""Matrices that engines leave whole (Muse-Spark's: vLLM 0.33.0, models/muse_spark, and SGLang 0.5.23: replicated)."""


@per_table
def uncut(table: OpTable) -> str:
    """A note on matrices that tensor parallelism should cut and a narrower config does not; empty if they are few."""
    sizes: dict[str, float] = {}
    total = 0.0
    for param in table.params:
        if param.role in ("linear", "other") and len(param.shape) == 2:
            size = param.full_numel * (table.layer_kinds.count(param.kind) if param.kind >= 0 else 1)
            total += size
            if table.tp > 1 and param.numel == param.full_numel and not param.module.endswith(WHOLE):
                name = param.module.rpartition("]")[2].lstrip(".")
                sizes[name] = sizes.get(name, 0.0) + size
    share = sum(sizes.values()) / total if total else 0.0
    if share < UNCUT_SAID:
        return ""
    largest = sorted(sizes, key=lambda name: -sizes[name])[:2]
    return (
        f"{100 * share:.0f} % of the linear weights ({', '.join(largest)}, ...) are whole on every tensor-parallel "
        "GPU, though engines may cut them: such layouts look slower than they are"
    )


def whose_attention(engine: EngineProfile, device: DeviceProfile, model: ModelProfile) -> list[str]:
    """Whose kernels run a model's attention, where that is told."""
    if engine.attention is None or is_latent(model.config) or text_of(model.config).get("compress_ratios"):
        return []
    library = engine.attention.library(device.architecture, model.config)
    why = "as asked" if engine.attention.asked else f"as {engine.name} {engine.version} chooses for it here"
    return [f"attention by {library.replace('_', ' ')} kernels, {why}"] if library else []


def on_hosts(table: OpTable, engine: EngineProfile) -> list[str]:
    """That rows of tables stay in the host's memory, as an engine keeps them unasked."""
    numbers = sum(p.full_numel * table.count(p) for p in table.params if p.role == "tables")
    if not numbers or not engine.host_tables:
        return []
    size = numbers * DTYPE_BYTES["mxfp8"] / 1e9
    return [f"{size:.0f} GB of tables of n-grams are in the memory of each host, as {engine.name} keeps them unasked; "
            "reading them from there, ahead of their layers, takes no time here"]  # fmt: skip


def not_counted(quantization: Quantization) -> list[str]:
    """What a checkpoint says of its precision that nothing here counts."""
    return [f"quantization_config: not used: {', '.join(quantization.unread)}"] if quantization.unread else []


def stored_otherwise(model: ModelProfile, quant: str | None, vendor: str) -> list[str]:
    """That the ``vendor`` of the devices publishes a model in the precision that was asked for, but not all of it."""
    if not quant:
        return []
    from tensorcast.modeling.checkpoint.released import PUBLISHES, published

    known = published(vendor, model.hf_id) if quant == PUBLISHES.get(vendor) else None
    if known is None:
        return []
    name, stored = known
    return [f"--quant {quant} stores all matmuls so; {name} is stored {stored.said}: its name as MODEL prices that"]
