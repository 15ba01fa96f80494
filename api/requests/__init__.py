"""How requests are read: JSON, query parameters, disconnections."""
