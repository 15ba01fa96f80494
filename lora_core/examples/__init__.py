"""The library alone, without the service: programs to read, run and copy from."""
