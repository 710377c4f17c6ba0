"""Sizes in closed form: monomials in the few quantities that a deployment changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""One number per call, or per candidate."""

Size = float | Array
"""A float, or a numpy array with one entry per candidate."""

ATOMS = ("B", "S", "L", "P", "R", "E", "X")
"""B sequences, S new tokens each, P cached tokens each, L = P + S; in the experts' region R rows on this rank,
E experts on this rank, X = 1 / (experts' tensor-parallel size)."""


@dataclass(frozen=True)
class Sizes:
    """Values of the atoms: floats, or numpy arrays with one entry per candidate."""

    B: Size
    S: Size
    P: Size
    R: Size = 0.0
    E: Size = 0.0
    X: Size = 1.0

    @property
    def L(self) -> Size:
        return self.P + self.S

    @property
    def tokens(self) -> Size:
        """T = B * S new tokens on this rank."""
        return self.B * self.S


class Dim(NamedTuple):
    """``coef * B^b * S^s * L^l * P^p * R^r * E^e * X^x + plus``, rounded down (up) where ``rounded`` is -1 (1)."""

    coef: float = 1
    B: int = 0
    S: int = 0
    L: int = 0
    P: int = 0
    R: int = 0
    E: int = 0
    X: int = 0
    plus: int = 0
    rounded: int = 0

    @property
    def powers(self) -> tuple[int, ...]:
        return tuple(self[1:8])

    @property
    def is_constant(self) -> bool:
        return not any(self.powers)

    def at(self, sizes: Sizes) -> Size:
        """The size as a number (or array)."""
        value: Size = self.coef
        for atom in _factors(self[1:8]):
            value = value * getattr(sizes, atom)
        if self.rounded:
            value = np.floor(value) if self.rounded < 0 else np.ceil(value)
        return value + self.plus if self.plus else value

    def __str__(self) -> str:
        factors = [
            (f"{atom}^{power}" if power > 1 else atom) if atom != "X" else "/etp"
            for atom, power in zip(ATOMS, self.powers, strict=True)
            if power
        ]
        coef = f"{self.coef:g}" if self.coef != int(self.coef) else str(int(self.coef))
        symbols = "".join(f if f.startswith("/") else f"·{f}" for f in factors).lstrip("·")
        text = (
            coef
            if not symbols
            else symbols
            if coef == "1" and not symbols.startswith("/")
            else (coef + symbols if symbols.startswith("/") else f"{coef}·{symbols}")
        )
        if self.rounded:
            text = f"⌊{text}⌋" if self.rounded < 0 else f"⌈{text}⌉"
        return f"{text}{self.plus:+d}" if self.plus else text


@cache
def _factors(powers: tuple[int, ...]) -> tuple[str, ...]:
    """The atoms to multiply, each as often as its power says; pricing evaluates the same few dims again and again."""
    return tuple(atom for atom, power in zip(ATOMS, powers, strict=True) for _ in range(power))


def constant(value: float) -> Dim:
    """A size that no deployment changes."""
    return Dim(value)


@cache
def product(dims: tuple[Dim, ...], expanded: tuple[int, ...] = ()) -> tuple[Dim, ...]:
    """Number of elements of a tensor, as monomials to be multiplied: one, unless some dim has an offset. Dims that are
    only ``expanded`` views, by position, count once."""
    coef: float = 1
    powers = [0] * len(ATOMS)
    offset: list[Dim] = []
    for dim in (dim for i, dim in enumerate(dims) if i not in expanded):
        if dim.plus or dim.rounded:
            offset.append(dim)
            continue
        coef *= dim.coef
        powers = [a + b for a, b in zip(powers, dim[1:8], strict=True)]
    return (Dim(coef, *powers), *offset)
