"""What every section of a recipe is: frozen, typed, without unknown keys or numbers that are not finite."""

from typing import Annotated

import pydantic
from pydantic import Field

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
