"""Examples of the library without the service."""
