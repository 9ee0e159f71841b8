"""
Evaluation with mteb: the benchmark, the runs, and the reports on them.

After `import lusifer_hf.evaluation`, `mteb.get_benchmark("LUSIFER(multilingual)")` finds the benchmarks.
"""

try:
    import mteb  # noqa: F401
except ImportError as error:
    raise ImportError('Evaluation needs mteb: pip install "lusifer-hf[eval]"') from error

from .benchmarks import register_benchmarks


register_benchmarks()
