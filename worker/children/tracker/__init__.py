"""What writes a run to a tracker: one file for each, imported by the child of main.py alone, which imports the
tracker's library when it opens a run."""
