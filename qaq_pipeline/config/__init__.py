"""The settings file as closed pydantic models, and how it is read. The modules that use a setting say what it does."""
