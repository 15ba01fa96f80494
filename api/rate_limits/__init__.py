"""How much one key, project or address may use."""
