"""What ``import tensorcast`` offers: names in, typed results out."""

from tensorcast.api.apart import compare_apart, simulate_apart
from tensorcast.api.deployments import compare, device_profile, experts, explain, predict_kernels, simulate
from tensorcast.api.limits import explain_limits
from tensorcast.api.replays import replay, replay_sweep
from tensorcast.api.vision import compare_encoders, simulate_encoder

__all__ = [
    "compare", "compare_apart", "compare_encoders", "device_profile", "experts", "explain",
    "explain_limits", "predict_kernels", "replay", "replay_sweep", "simulate", "simulate_apart", "simulate_encoder",
]
