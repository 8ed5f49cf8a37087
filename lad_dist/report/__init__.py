"""Many run folders as one comparison: methods by tasks, mean ± sd over seeds."""
