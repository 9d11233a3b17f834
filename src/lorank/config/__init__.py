"""A run as one YAML file: what may stand in it, and what is wrong with it."""

from lorank.config.errors import ConfigError
from lorank.config.settings import RunConfig, json_schema, load_config, make_config, to_yaml

__all__ = ["ConfigError", "RunConfig", "json_schema", "load_config", "make_config", "to_yaml"]
