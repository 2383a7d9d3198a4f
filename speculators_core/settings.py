"""Options that a caller hands in as keywords, checked by pydantic."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from speculators_core.errors import SpeculatorError, first_fault


class Settings(BaseModel):
    """Options with bounds in their types; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Self:
        """The options of a call.

        Raises:
            SpeculatorError: an option is unknown or out of bounds; ``where`` names the call.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise SpeculatorError(f"{where}: {first_fault(error)}") from error
