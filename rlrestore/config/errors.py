"""The one error of a config that is wrong; apart from its readers, so that each of them can raise it."""


class ConfigError(ValueError):
    """The user's config is wrong; the message says where and what to do. Exit code 64."""
