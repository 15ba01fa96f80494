"""Engine, sessions, the database clock, and the errors of drivers. Imports only `tables`."""
