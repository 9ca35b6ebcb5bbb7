"""The settings file: closed pydantic models and the loader. The module that uses a setting describes its effect."""
