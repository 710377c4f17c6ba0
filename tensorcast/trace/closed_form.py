"""From three traces at prime sizes to closed forms.

B, S, P are drawn so that B, S, S+P and P's large factor are distinct primes that no model dimension shares: factoring
a recorded size then reads off its monomial. The second and third trace verify it; what fits no monomial is tried as
``monomial/c + d`` and must fit all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from tensorcast.trace.dims import Dim


@dataclass(frozen=True)
class Probe:
    """Sizes of one trace: ``S = block * s``, ``P = 2 * block * half``, with B, s, half and ``s + 2 * half`` prime."""

    B: int
    s: int
    half: int
    block: int = 1

    @property
    def S(self) -> int:
        return self.block * self.s

    @property
    def P(self) -> int:
        return 2 * self.block * self.half

    @property
    def L(self) -> int:
        return self.S + self.P


PREFILL = (Probe(1009, 3001, 5003), Probe(1013, 3011, 5119), Probe(1019, 4159, 5009))
"""The third is far from the others, so that a program that loops over blocks of tokens shows by its number of ops."""
DECODE = (Probe(1009, 1, 5003), Probe(1013, 1, 5039), Probe(1019, 1, 5051))
BLOCK = 128
BLOCKWISE = tuple(Probe(p.B, p.s, p.half, BLOCK) for p in PREFILL)
"""For models that cut the sequence into blocks (compressed caches): exact where S and P are multiples of BLOCK."""


class NoClosedForm(ValueError):
    """A size that is no monomial in B, S, P."""


class ProgramVaries(NoClosedForm):
    """Which ops run depends on the sizes: a Python loop over tokens or blocks of them."""


def solve(values: Sequence[int], probes: Sequence[Probe]) -> Dim:
    """The closed form of a size seen as ``values`` at ``probes``. Raises :class:`NoClosedForm`."""
    return _solve(tuple(values), tuple(probes))


@lru_cache(maxsize=65536)  # one trace asks for the same few hundred sizes thousands of times
def _solve(values: tuple[int, ...], probes: tuple[Probe, ...]) -> Dim:
    if len(set(values)) == 1:
        return Dim(values[0])
    for dim in _candidates(values, probes):
        if all(_evaluate(dim, probe) == value for value, probe in zip(values, probes, strict=True)):
            return dim
    raise NoClosedForm(f"sizes {list(values)} at {[(p.B, p.S, p.P) for p in probes]}")


def _candidates(values: Sequence[int], probes: Sequence[Probe]) -> Iterator[Dim]:
    """Closed forms from the likeliest on; made one at a time, since the first nearly always fits."""
    yield _factor(values[0], probes[0])
    yield from _affine(values, probes)
    yield from _rounded(values, probes)


def _evaluate(dim: Dim, probe: Probe) -> Fraction:
    powers = {"B": probe.B, "S": probe.S, "L": probe.L, "P": probe.P}
    value = Fraction(dim.coef).limit_denominator(1 << 16)  # ninths are no floats
    for atom, size in powers.items():
        value *= size ** getattr(dim, atom)
    if dim.rounded:
        value = Fraction(math.floor(value) if dim.rounded < 0 else math.ceil(value))
    return value + dim.plus


def _factor(value: int, probe: Probe) -> Dim:
    powers = {}
    for atom, prime in (("B", probe.B), ("S", probe.s), ("L", probe.s + 2 * probe.half), ("P", probe.half)):
        powers[atom] = 0
        while prime > 1 and value and value % prime == 0:
            value //= prime
            powers[atom] += 1
    coef = Fraction(value, 2 ** powers["P"] * probe.block ** (powers["S"] + powers["L"] + powers["P"]))
    return Dim(_plain(coef), **powers)


def _affine(values: Sequence[int], probes: Sequence[Probe]) -> list[Dim]:
    """Candidates ``c * monomial + d`` through the first two points."""
    found = []
    for powers in ({"S": 1}, {"L": 1}, {"P": 1}, {"B": 1}, {"B": 1, "S": 1}, {"B": 1, "L": 1}):
        unit = Dim(1, **powers)
        at = [_evaluate(unit, probe) for probe in probes[:2]]
        if at[0] == at[1]:
            continue
        slope = Fraction(values[0] - values[1]) / (at[0] - at[1])
        offset = values[0] - slope * at[0]
        if slope > 0 and offset.denominator == 1 and abs(offset) <= 65536 and slope.denominator <= 1024:
            found.append(Dim(_plain(slope), **powers, plus=int(offset)))
    return found


BLOCKS = (2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _rounded(values: Sequence[int], probes: Sequence[Probe]) -> list[Dim]:
    """Candidates ``floor`` or ``ceil`` of ``monomial / n``, plus a few: blocks, strides and compression ratios."""
    found = []
    for powers in ({"S": 1}, {"L": 1}, {"P": 1}, {"B": 1, "S": 1}, {"B": 1, "L": 1}):
        for block in BLOCKS:
            for rounded in (-1, 1):
                dim = Dim(1 / block, **powers, rounded=rounded)
                offset = values[0] - _evaluate(dim, probes[0])
                if abs(offset) <= 4:
                    found.append(dim._replace(plus=int(offset)))
    # ⌊x⌋ + 1 and ⌈x⌉ agree wherever x is no whole number: the one without an offset is meant.
    return sorted(found, key=lambda dim: abs(dim.plus))


def _plain(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)
