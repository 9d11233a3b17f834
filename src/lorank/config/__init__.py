"""The configuration of a run as one YAML file: its keys, and the errors in it."""

from lorank.config.errors import ConfigError
from lorank.config.settings import RunConfig, json_schema, load_config, make_config, to_yaml

__all__ = ["ConfigError", "RunConfig", "json_schema", "load_config", "make_config", "to_yaml"]
