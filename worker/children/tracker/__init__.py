"""The child process that writes a run to a tracker."""
