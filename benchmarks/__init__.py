"""Benchmarks: suites of named cases, and the one runner that checks, times and weighs them (``vlp-fast bench --suite``)."""
