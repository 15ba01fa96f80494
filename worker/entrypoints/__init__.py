"""The processes that an operator starts."""
