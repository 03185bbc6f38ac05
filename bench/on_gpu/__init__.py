"""Everything that `make gpu` does on a GPU: facts, tests, sanitizers, timings, a report."""
