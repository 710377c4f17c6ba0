"""Figures that carry where they come from."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, such as 4.8e12")
    # YAML 1.1 reads 4.8e12 as a string (it wants 4.8e+12); people write the former.
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError("must be a number, such as 4.8e12") from None


Number = Annotated[float, BeforeValidator(_number)]


class Frozen(BaseModel):
    """Base of every profile object: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Figure(Frozen):
    """One number and its source (a key of the profile's ``sources``, or a sentence)."""

    value: Number = Field(gt=0, allow_inf_nan=False)
    source: str = Field(min_length=3)

    def __float__(self) -> float:
        return self.value
