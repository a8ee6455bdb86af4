"""What every section of a recipe is: frozen, typed, without unknown keys or numbers that are not finite."""

from typing import Annotated, ClassVar

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
MOST = 2**31 - 1
"""More than a run has of anything; no product of two such numbers leaves 64 bits."""
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(gt=0, le=MOST)]
Name = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
"""Of a file, a folder or what may be one."""
OptionalName = Annotated[str | None, Field(min_length=1, pattern=r"^[^\x00]*$")]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Keys of which one at most is given: one on the command line takes the place of another in the file."""
