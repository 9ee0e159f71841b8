"""
Evaluation with mteb: the benchmark, the runs, and the reports on them.

After `import lusifer_hf.evaluation`, `mteb.get_benchmark("LUSIFER(multilingual)")` finds the benchmarks.
"""

from importlib.util import find_spec


if find_spec("mteb") is None:
    raise ImportError('Evaluation needs mteb: pip install "lusifer-hf[eval]"')

from .benchmarks import register_benchmarks


register_benchmarks()
