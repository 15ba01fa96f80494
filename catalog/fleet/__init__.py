"""Workers, gangs, cordons, version compatibility and placement."""
