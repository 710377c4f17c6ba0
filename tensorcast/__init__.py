"""tensorcast: what a Mixture-of-Experts model will cost on a cluster, before you rent it."""

from tensorcast.api import compare, device_profile, explain, predict_kernels, simulate
from tensorcast.errors import InputError
from tensorcast.version import __version__

__all__ = ["InputError", "__version__", "compare", "device_profile", "explain", "predict_kernels", "simulate"]
