"""Programs that test a whole service and that pytest does not run: fault injection and fuzzing."""
