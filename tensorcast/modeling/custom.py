"""A model that is a Python class of the user's: loaded where a profile names it, wrapped so that it traces and runs.

Its own code runs. Where it calls ``torch.nn.functional.scaled_dot_product_attention`` the package's attention and cache
take over, and its MoE blocks are rewritten by the profile's ``moe`` section.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from tensorcast.errors import InputError
from tensorcast.modeling.attention import attention_forward, cache_argument
from tensorcast.modeling.moe.apply import apply_moe, check_blocks, moe_blocks
from tensorcast.modeling.moe.parallel import MoEOptions
from tensorcast.profiles.model import ModelProfile, MoEFields

LOOK_TOKENS = 8


class CustomConfig(PreTrainedConfig):
    """What the tracer asks a config for, of a class of the user's: found in the model itself."""

    model_type = "custom_class"

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def of_rank(self, tp: int) -> dict[str, Any]:
        """The class's arguments on one of ``tp`` ranks: those that the profile calls sharded, divided."""
        divided = dict(self.arguments)
        for name in self.sharded:
            if divided[name] % tp:
                raise InputError(f"tp={tp}: {name}={divided[name]} does not divide by it")
            divided[name] //= tp
        return divided


def load_class(target: str, name: str = "") -> type[nn.Module]:
    """The class at ``package.module:Class`` or ``file.py:Class``. Raises :class:`InputError`, one line."""
    where, _, kind = target.rpartition(":")
    try:
        module = _local_module(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as reason:
        problem = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        raise InputError(f"model {name}: model: {where} cannot be imported ({problem})") from None
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise InputError(f"model {name}: model: {where} has no torch module {kind!r}; it has {', '.join(classes)}")
    return found


def _local_module(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    key = "tensorcast_local_" + hashlib.sha256(f"{path.resolve()}\0{path.read_text('utf-8')}".encode()).hexdigest()[:16]
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses and pickles look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def custom_config(profile: ModelProfile) -> CustomConfig:
    """The config of a profile that names a class: its arguments, and the sizes that the built model shows."""
    arguments = {k: v for k, v in profile.config.items() if k not in ("model_type", "architectures")}
    if missing := [name for name in profile.sharded if not isinstance(arguments.get(name), int)]:
        raise InputError(f"model {profile.name}: sharded: {missing[0]!r} is no number in config; "
                         f"it has {', '.join(arguments)}")  # fmt: skip
    config = CustomConfig(
        target=str(profile.model), name=profile.name, arguments=arguments, sharded=profile.sharded, moe=profile.moe
    )
    with torch.device("meta"):
        model = CustomLM(config)
    model.set_attn_implementation("")
    model.set_experts_implementation("")
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise InputError(f"model {profile.name}: {profile.model} has no nn.Embedding; a language model starts with one")
    sizes = {"vocab_size": embedding.num_embeddings, "hidden_size": embedding.embedding_dim}
    try:
        with torch.no_grad():
            model(torch.empty((1, LOOK_TOKENS), dtype=torch.long, device="meta"))
    except InputError:
        raise
    except Exception as reason:
        line = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:160]
        unnamed = next((path for path, m in model.model.named_modules() if _looped(m)), "")
        line = f"{unnamed} looks like a MoE block that the profile's moe section does not name" if unnamed else line
        raise InputError(
            f"model {profile.name}: {profile.model} cannot be called on tensors without data: {line}"
        ) from None
    heads = {"num_attention_heads": model.heads[0], "num_key_value_heads": model.heads[1]} if model.heads[0] else {}
    for key, value in {**sizes, **heads, "num_hidden_layers": max(1, model.layers)}.items():
        object.__setattr__(config, key, value)
    return config


class CustomLM(nn.Module):
    """A user's model under the call of a causal language model. ``heads``: of queries and keys, as last seen."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__()
        self.config = config
        kind = load_class(config.target, config.name)
        try:
            self.model = kind(**config.arguments)
        except InputError:
            raise
        except Exception as reason:
            takes = ", ".join(list(inspect.signature(kind.__init__).parameters)[1:])
            line = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:160]
            raise InputError(
                f"model {config.name}: {config.target} cannot be built from config: {line}; it takes {takes}"
            ) from None
        self.takes = list(inspect.signature(self.model.forward).parameters)
        found = _layers(self.model)
        self.layers = len(found)
        self._no_split_modules = sorted({type(layer).__name__ for layer in found})
        self.heads, self._own_attention = (0, 0), False

    def set_attn_implementation(self, _: str) -> None:
        """From now on the package's attention runs where the model calls torch's."""
        self._own_attention = True

    def set_experts_implementation(self, name: str) -> None:
        """Put the package's MoE layer in the place of every block; ``eager`` leaves them."""
        fields: MoEFields = self.config.moe
        if name != "eager" and (fields.experts or list(moe_blocks(self.model, fields))):
            check_blocks(self.model, fields, self.config.name)
            apply_moe(self.model, options=MoEOptions(**fields.options), fields=fields, name=self.config.name)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        """``[B,S]`` token ids -> logits, as the class itself gives them."""
        cache = cache_argument(self.model.forward)
        more = {k: v for k, v in {**given, cache: past_key_values}.items() if k in self.takes[1:]}
        with torch.device(input_ids.device):
            if not self._own_attention:
                return _logits(self.model(input_ids, **more))
            attention = _OwnAttention(None if cache in more else past_key_values)
            with attention:
                out = self.model(input_ids, **more)
        self.heads = attention.heads
        return _logits(out)


class _OwnAttention(TorchFunctionMode):
    """Inside, torch's scaled dot product attention is the package's, its keys and values through the cache."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache, self.calls, self.heads = cache, 0, (0, 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(  # noqa: PLR0917 -- the signature of torch's function, which models call by position
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if query.dim() != 4:
            raise InputError(f"attention on {query.dim()}-dimensional queries: must be [batch, heads, tokens, width]")
        self.heads = (query.shape[1], key.shape[1])
        if self.cache is not None:
            key, value = self.cache.update(key, value, self.calls)
        self.calls += 1
        causal = is_causal or attn_mask is not None or query.shape[2] == 1
        layer: Any = SimpleNamespace(layer_idx=0, config=None)
        out, _ = attention_forward(layer, query, key, value, scaling=scale, is_causal=causal)
        return out.transpose(1, 2)


def _looped(module: nn.Module) -> bool:
    """Whether a module holds a list of modules beside a linear layer with an output for each: experts and a gate."""
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) > 1]
    others = [m for m in module.children() if not isinstance(m, nn.ModuleList)]
    gates = [m for part in others for m in part.modules() if isinstance(m, nn.Linear)]
    return any(gate.out_features == len(experts) for gate in gates for experts in lists)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the longest list that lies in no other one."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [m for path, m in lists.items() if not any(path.startswith(other + ".") for other in lists)]
    return list(max(outer, key=lambda found: len(list(found)))) if outer else []


def _logits(out: Any) -> Any:
    return getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
