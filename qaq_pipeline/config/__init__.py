"""The settings file as closed pydantic models, and how it is read. What a setting does is said where it is used."""
