"""The vocabulary of a traced step: custom ops in namespace ``tensor_cast``, one file per family.

Importing this package registers every op with torch. Each has a schema, a fake kernel that is shape arithmetic only
(so it works on meta tensors, under FakeTensorMode and with symbolic sizes), and a real kernel.
"""

from tensorcast.ops import attention, collectives, flops, low_latency, moe, quantized, recurrent

__all__ = ["attention", "collectives", "flops", "low_latency", "moe", "quantized", "recurrent"]
