"""Workers, gangs, cordons, compatibility and placement."""
