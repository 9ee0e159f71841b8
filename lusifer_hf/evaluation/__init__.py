"""Evaluation with mteb: the benchmark, the runs, and the reports on them."""
