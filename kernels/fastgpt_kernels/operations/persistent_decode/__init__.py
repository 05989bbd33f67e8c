"""One new token of one row, over a static cache: a step in one kernel."""
