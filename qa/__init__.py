"""Programs that test a whole service and are not run by pytest: fault injection and fuzzing."""
