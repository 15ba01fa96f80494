"""A measurement of the engine on a GPU within minutes, whose results are useful whenever it is stopped."""
