"""What the keys of a config are made of: types that read numbers and flags strictly, and the rules
that stand beside a key. Backbones use the types for their arguments, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from utils.cli import MAX_IMAGES, plain_name, read_image_size, read_number, read_sequence
from utils.files import expand_home

PathText = Annotated[str, AfterValidator(expand_home)]
Name = Annotated[str, BeforeValidator(plain_name)]
Int = Annotated[int, BeforeValidator(read_number)]
Float = Annotated[float, BeforeValidator(read_number), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
PositiveInt = Annotated[Int, Field(ge=1, le=2**31 - 1)]
ImageCount = Annotated[Int, Field(ge=1, le=MAX_IMAGES)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
Factor = Annotated[Float, Field(gt=0, le=1)]
Beta = Annotated[Float, Field(gt=0, lt=1)]
Scale = Annotated[Float, Field(ge=1e-3, le=1e3)]
Channels = Annotated[Int, Field(ge=1, le=64)]
Side = Annotated[Int, Field(ge=1, le=2**14)]
Byte = Annotated[Int, Field(ge=0, le=255)]
Timesteps = Annotated[Int, Field(ge=2, le=10**6)]
ImageSize = Annotated[tuple[Side, Side], BeforeValidator(read_image_size)]
Range = tuple[Float, Float]
Colors = Annotated[tuple[tuple[Byte, ...], ...], Field(min_length=2, max_length=64)]
Numbers = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(read_sequence)]
Condition = tuple[str, Callable[[Any], bool]]  # its words in a warning, and whether it holds


def having(**values: Any) -> Condition:
    """The condition that other keys have these values. The words are those of the last key."""
    words = [f"{name}={value!r}" for name, value in values.items()][-1]
    return words, lambda config: all(getattr(config, k) == v for k, v in values.items())


def key(
    default: Any,
    *,
    resume: Literal["architecture", "meaning", "run", "warn"] | None = None,
    needs: Condition | None = None,
    was: Any = None,
    also: str = "",
) -> Any:
    """A key of the config, as a pydantic field.

    Args:
        resume: what another value does to weights trained with this one. They do not fit it
            ("architecture"), they mean something else ("meaning"), or their training becomes that
            of another run ("run"); all three are refused. "warn": it is allowed, with a warning.
        needs: the condition without which the key has no effect; default: it always has one.
        was: its default in earlier versions. Their runs go on with it if their config has no value.
        also: what other projects call it, with spaces between the names; for hints alone.
    """
    rules = dict(resume=resume, needs=needs, was=was, also=also.split())
    return Field(default, json_schema_extra=rules)
