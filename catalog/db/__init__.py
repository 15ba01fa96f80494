"""Engine, sessions, the database clock, and the translation of driver errors. Imports only `tables`."""
