"""How a setting is declared, and what follows from a declaration: flags, validation, identity, JSON Schema.

Only the standard library is imported here; pydantic is loaded when a settings object is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from entrodrop_prep.errors import ConfigError

Role = Literal["identity", "operation"]
T = TypeVar("T")
MOST = 2**63 - 1
"""Of a whole number: what files can hold."""


@dataclass(frozen=True)
class Setting:
    """What the command line, the schemas and the docs say about one field.

    ``repeat``: the flag may be given again. ``whole``: a text is one value of a list, whatever commas it holds.
    ``off``: the flag that says no to a setting that is true by default, where it is not ``--no-...``. ``panel``: the
    group of flags in which the help and the docs show it.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    metavar: str | None = None
    role: Role = "identity"
    argument: bool = False
    repeat: bool = False
    whole: bool = False
    default_text: str | None = None
    off: str | None = None
    panel: str = "Main"


def flag(name: str) -> str:
    """``max_length`` -> ``--max-length``."""
    return "--" + name.replace("_", "-")


def is_number(text: str) -> bool:
    """Whether a text is a whole number from 0 on, of digits that Python takes."""
    return text.isdecimal() and len(text) <= 18


def value_text(kind: Any, s: Setting) -> str:
    """What a value of the setting looks like, such as ``N`` or ``auto|cpu``; "" for a switch."""
    base = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
    if s.metavar:
        return s.metavar
    if get_origin(base) is Literal:
        return "|".join(get_args(base))
    return {int: "N", float: "X", bool: ""}.get(base, "TEXT")


def settings(cls: type) -> dict[str, tuple[Any, Setting, Any]]:
    """Field name -> (type without its annotation, Setting, default or MISSING), in the order of declaration."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kind, setting = get_args(hint)[0], next(m for m in hint.__metadata__ if isinstance(m, Setting))
        found[f.name] = (kind, setting, f.default)
    return found


def identity(config: Any) -> dict[str, Any]:
    """The settings that the stored result depends on, as plain JSON values."""
    values = {}
    for name, (_, setting, _default) in settings(type(config)).items():
        if setting.role == "identity":
            value = getattr(config, name)
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


@functools.cache
def model_of(cls: Any) -> Any:
    """The pydantic model that validates ``cls`` and gives its JSON Schema."""
    import pydantic

    fields: dict[str, Any] = {}
    for name, (kind, s, default) in settings(cls).items():
        limits: dict[str, Any] = {
            k: v for k, v in (("ge", s.ge), ("gt", s.gt), ("le", s.le), ("lt", s.lt)) if v is not None
        }
        required = default is dataclasses.MISSING
        if float in (kind, *get_args(kind)) and get_origin(kind) is not tuple:
            limits["allow_inf_nan"] = False
        base = next((k for k in get_args(kind) if k is not type(None)), kind) if type(None) in get_args(kind) else kind
        if base is int:
            limits.setdefault("le", MOST)
        limited: Any = Annotated[base, pydantic.Field(**limits)] if limits else base
        if base is not kind:
            limited = limited | None
        info = pydantic.Field(... if required else default, description=s.help)
        read = _whole if s.whole else functools.partial(_from_text, kind)
        fields[name] = (Annotated[limited, pydantic.BeforeValidator(read)], info)
    config = pydantic.ConfigDict(extra="forbid", title=cls.__name__)
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _from_text(kind: Any, value: Any) -> Any:
    """Flags are text: ``A,B`` for tuples, JSON for objects; bool is no number."""
    kinds = [k for k in (kind, *get_args(kind)) if k is not None]
    if bool not in kinds and any(isinstance(v, bool) for v in (value if isinstance(value, (list, tuple)) else [value])):
        raise ValueError("should not be true or false")
    if isinstance(value, str):
        if any(get_origin(k) is tuple for k in kinds):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if any(get_origin(k) is dict for k in kinds):
            try:
                return json.loads(value)
            except (json.JSONDecodeError, RecursionError) as e:
                raise ValueError(f"is not JSON: {e}") from e
    if str in kinds and isinstance(value, (int, Path)) and not isinstance(value, bool):
        return str(value)
    if kind is str and isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)
    return value


def _whole(value: Any) -> Any:
    """One text or path, or a list of them, as a tuple of texts."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(str(v) if isinstance(v, Path) else v for v in values)


def validate(config: Any) -> None:
    """Check types and ranges and write the values back as their declared types.

    Raises ConfigError naming the flag and the value.
    """
    import pydantic

    cls: Any = type(config)
    raw = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    try:
        checked = model_of(cls).model_validate(raw)
    except pydantic.ValidationError as e:
        problem = e.errors()[0]
        name = str(problem["loc"][0])
        message = str(problem["msg"]).removeprefix("Value error, ")
        again = f"give {flag(name)} once for each value; " if settings(cls)[name][1].repeat else ""
        raise ConfigError(
            f"{flag(name)} {raw.get(name)!r}: {message[:1].lower()}{message[1:]}",
            fix=f"{again}see {flag(name)} in --help",
        ) from None
    for name in raw:
        object.__setattr__(config, name, getattr(checked, name))


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """``cls(**values)``, with a ConfigError for a name that is missing or unknown."""
    known = settings(cls)
    for name, (_, s, default) in known.items():
        if default is dataclasses.MISSING and name not in values:
            label = name.upper() if s.argument else flag(name)
            raise ConfigError(f"{label} is missing", fix=f"{s.help[:1].lower()}{s.help[1:]}")
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown setting {name!r}", fix=f"did you mean {near[0]}?" if near else "see --help")
    return cls(**values)
