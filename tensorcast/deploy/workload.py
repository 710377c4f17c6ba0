"""What one step is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from tensorcast.errors import InputError
from tensorcast.profiles.model import ModelProfile


@dataclass(frozen=True)
class Workload:
    """A step of one phase.

    ``batch`` is the number of sequences **per data-parallel rank** (attention dp), as engines count it. Decode: one new
    token each after ``context`` cached ones. Prefill: ``input_len`` new tokens each after ``context`` cached ones
    (0 unless a prefix is cached).
    """

    phase: str
    batch: int
    input_len: int = 1
    context: int = 0

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            tower = "; --phase encode is of images" if self.phase == "encode" else ""
            raise InputError(f"--phase {self.phase!r}: must be prefill or decode{tower}")
        if self.batch < 1:
            raise InputError(f"--batch {self.batch}: must be at least 1 sequence per data-parallel rank")
        if self.input_len < 1:
            raise InputError(f"--input-len {self.input_len}: must be at least 1 token")
        if self.context < 0:
            raise InputError(f"--context {self.context}: must be at least 0 cached tokens")
        if self.phase == "decode" and self.input_len != 1:
            raise InputError(
                f"--input-len {self.input_len}: a decode step has 1 new token; use --context for cached ones"
            )

    def check_length(self, model: ModelProfile) -> None:
        """Raise :class:`InputError` where the sequences are longer than ``model`` has positions."""
        if problem := model.too_long(self.length):
            new = f"--input-len {self.input_len} and " if self.phase == "prefill" else ""
            raise InputError(f"{new}--context {self.context}: {problem}")

    @property
    def length(self) -> int:
        """Tokens per sequence at the end of the step."""
        return self.context + self.input_len
