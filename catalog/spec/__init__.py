"""What a job may ask for, and the resolved specification that a worker trains. Pure: no database."""
