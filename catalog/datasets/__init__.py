"""Whether a file is a valid data set of its kind. Pure: no database."""
