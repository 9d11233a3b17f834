"""The configuration of a run as one YAML file: its keys, and the errors in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorank.lazy import lazy_attributes

if TYPE_CHECKING:
    from lorank.config.errors import ConfigError
    from lorank.config.settings import RunConfig, json_schema, load_config, make_config, to_yaml

_HOMES = {
    "ConfigError": "errors",
    "RunConfig": "settings",
    "json_schema": "settings",
    "load_config": "settings",
    "make_config": "settings",
    "to_yaml": "settings",
}

__all__ = ["ConfigError", "RunConfig", "json_schema", "load_config", "make_config", "to_yaml"]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
