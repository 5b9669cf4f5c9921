"""Typed configuration: frozen pydantic models, read from TOML, overridden from the command line, digested."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import UserError


class Config(BaseModel):
    """Base of every configuration model: frozen; a key nobody declared is an error, and so is an endless number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def knob(default: Any, description: str, **constraints: Any) -> Any:
    """Declare a field that changes how work is done but not what comes out (threads, concurrency, addresses).

    Such fields are left out of `digest`, so a corpus may be continued with other values of them. A field that
    is no knob needs a default that does what was done before there was the field: see `completed`.
    """
    return Field(default, description=description, json_schema_extra={"knob": True}, **constraints)


def load_toml(path: str | Path, model: type[ConfigT]) -> ConfigT:
    """Read a TOML file into `model`.

    Raises:
        UserError: the file is missing, is not TOML, or holds an unknown key or a value out of range;
            the message names the key and, for an unknown one, the nearest known key.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return parse(raw, model, source=str(path))


def parse(raw: Mapping[str, Any], model: type[ConfigT], *, source: str) -> ConfigT:
    """Validate a plain mapping as `model`; `source` is named in the error. Raises UserError."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error, model)}") from None


def override(base: ConfigT, given: ConfigT) -> ConfigT:
    """Lay the fields that were set explicitly on `given` (for example on the command line) over `base`."""
    merged: dict[str, Any] = {name: getattr(base, name) for name in type(base).model_fields}
    for name in given.model_fields_set:
        value, under = getattr(given, name), merged[name]
        if isinstance(value, Config) and type(value) is type(under):
            merged[name] = override(under, value)
        else:
            merged[name] = value
    explicit = base.model_fields_set | given.model_fields_set
    return type(base).model_validate({name: merged[name] for name in explicit})


def assigned(base: ConfigT, settings: Sequence[str], *, source: str) -> ConfigT:
    """Lay settings such as `image.size=256` over a configuration; a value is TOML's or, where it is none, a text.

    Raises:
        UserError: a setting without `=`, an unknown key, or a value out of range; `source` is named.
    """
    raw = base.model_dump(mode="json", exclude_unset=True)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{source} {setting}: gives no value; write KEY=VALUE")
        *tables, name = key.strip().split(".")
        place = raw
        for table in tables:
            if not isinstance(place.get(table), dict):
                place[table] = {}
            place = place[table]
        try:
            place[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            place[name] = text.strip()
    return parse(raw, type(base), source=source)


def essence(config: Config) -> dict[str, Any]:
    """Return the part of `config` that decides what comes out, as JSON values; `knob` fields are left out."""
    kept: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("knob"):
            continue
        value = getattr(config, name)
        kept[name] = essence(value) if isinstance(value, Config) else _plain(value)
    return kept


def digest(config: Config) -> str:
    """Return a hex digest (16 characters) of `essence(config)`: equal digests give equal outputs."""
    return hashlib.sha256(json.dumps(essence(config), sort_keys=True).encode()).hexdigest()[:16]


def completed(recorded: Mapping[str, Any], model: type[Config]) -> dict[str, Any]:
    """Return a recorded essence with today's default for every option of `model` that it does not have.

    So what was begun before an option existed can be gone on with, if the default does what was done without it.
    """
    whole = dict(recorded)
    for name, field in model.model_fields.items():
        extra, default = field.json_schema_extra, field.get_default(call_default_factory=True)
        if field.is_required() or (isinstance(extra, dict) and extra.get("knob")):
            continue
        now = essence(default) if isinstance(default, Config) else _plain(default)
        whole[name] = _laid_over(now, recorded[name]) if name in recorded else now
    return whole


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every key on which two essences differ, as `image.size: 256 there, 128 now`."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} there, {after!r} now")
    return found


def nearest(word: str, known: list[str]) -> str:
    """Return ` (did you mean 'X'?)` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _laid_over(default: Any, recorded: Any) -> Any:
    if not (isinstance(default, Mapping) and isinstance(recorded, Mapping)):
        return recorded
    return {**default, **{name: _laid_over(default.get(name), value) for name, value in recorded.items()}}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parent = _model_at(model, [str(part) for part in first["loc"][:-1]])
        known = list(parent.model_fields) if parent else []
        return f"unknown key '{where}'{nearest(str(first['loc'][-1]), known)}"
    return f"'{where}': {first['msg']} (got {first.get('input')!r})"


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    current: Any = model
    for name in path:
        field = current.model_fields.get(name)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        current = field.annotation
    return current
