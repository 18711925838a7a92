"""Tests import the benchmarks' modules by the names that the scripts use."""

import benchmark_scripts

benchmark_scripts.import_all()
