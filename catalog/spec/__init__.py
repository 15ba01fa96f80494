"""The job request, and the resolved specification that a worker trains. Pure: no database."""
