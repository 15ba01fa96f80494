"""Organizations, projects, API keys, sign-in and scopes."""
