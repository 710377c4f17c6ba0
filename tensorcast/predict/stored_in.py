"""What the weights and the cache of a row's model are stored in."""

from __future__ import annotations

from tensorcast.deploy.model_names import SCHEME_OF, Named, named_precision
from tensorcast.errors import InputError, unknown_name
from tensorcast.modeling.checkpoint.released import PUBLISHES, Stored, published, published_in_fp8, released
from tensorcast.predict.cells import Cells
from tensorcast.profiles.store import load_device

FP8_CACHE = (("trtllm", "fp8"),)
"""Engines and precisions of its records with an FP8 cache where no launch is known: TensorRT-LLM's own FP8 checkpoints
ask for it."""

PRECISIONS = ("precision", "gemm_precision", "moe_precision")
"""Columns that say it."""


def stored_in(cells: Cells, named: Named, model: str, device: str, record: bool) -> tuple[str, str | None]:
    """Name of the profile that a row's ``model`` is, or of the known release, and the scheme of its weights as an
    option where that says nothing of it. ``record``: one of a public benchmark's."""
    profile = named.profile.name if named.near else model
    if profile.casefold() != model.casefold():
        cells.assumed.append(f"model {profile}")
    said = {SCHEME_OF.get(text.lower()) for column in PRECISIONS if (text := cells.text(column, None)) is not None}
    if named.near:
        meant, known = SCHEME_OF.get(named.precision), released(model)
        name, found = model, known if said <= {meant} else None
    else:
        name, found = _published(named, device, said) if record else ("", None)
    if found is None:
        return profile, _quant(cells, named, record)
    cells.assumed.append(f"stored {found.said}")
    return name, None


def _published(named: Named, device: str, said: set[str | None]) -> tuple[str, Stored | None]:
    """The release of a shipped model that a public record's precision means, where the model does not ship in as many
    bits itself, as DeepSeek-V4 does: in FP4 what the vendor of its device publishes, in FP8 what the model's does."""
    if len(said) != 1 or named.quant(meant := next(iter(said)), meant) is None:
        return "", None
    if meant == "fp8":
        return published_in_fp8(named.profile.hf_id) or ("", None)
    try:
        vendor = load_device(device.replace("_", "-")).vendor
    except InputError:  # said where the row is served
        return "", None
    return (meant == PUBLISHES.get(vendor) and published(vendor, named.profile.hf_id)) or ("", None)


def _quant(cells: Cells, named: Named, record: bool) -> str | None:
    """Scheme of linears and experts, as an option; without a column, what the model's name says. A public ``record``
    says fp8 of what its vendor's FP8 release stores in blocks, as a name would, and of linears beside experts in them,
    which such a checkpoint stores in blocks as well."""
    whole = cells.text("precision", None)
    if whole is None and named.precision and not cells.text("gemm_precision", cells.text("moe_precision", None)):
        whole = named.precision
        cells.assumed.append(f"precision {whole} (in the model's name)")
    said = [cells.text(column, None) or whole for column in ("gemm_precision", "moe_precision")]
    for column, precision in zip(("gemm_precision", "moe_precision"), said, strict=True):
        if precision is not None and precision.lower() not in SCHEME_OF:
            raise unknown_name(column if cells.text(column, None) else "precision", precision, SCHEME_OF)
    if record and said[0] == "fp8" and said[1] in ("fp8", "fp8_block"):
        own = named_precision(f"{named.profile.hf_id}-FP8")
        said = ["fp8_block", "fp8_block"] if "fp8_block" in (own, said[1]) else said
    return named.quant(said[0], said[1])


def kv_dtype(cells: Cells, engine: str, stated: frozenset[str]) -> str | None:
    """Scheme of the cache, as an option; None for the engine's own choice."""
    said = cells.text("kv_dtype", None)
    if said is None and "moe_ep_size" in stated and (engine, cells.text("precision", None)) in FP8_CACHE:
        cells.assumed.append("kv_dtype fp8")
        return "fp8"
    if said is None or (scheme := SCHEME_OF.get(said.lower())) == "":
        return None
    if scheme not in ("bf16", "fp8"):
        raise InputError(f"kv_dtype {said!r}: must be bf16 or fp8")
    return scheme
