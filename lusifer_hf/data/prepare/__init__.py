"""From raw text to training data: import, clean, deduplicate, decontaminate, mine negatives, cluster, sample."""

from importlib.util import find_spec


for package in ("datasets", "faiss", "regex", "rensa"):
    if find_spec(package) is None:
        raise ImportError(f'Data preparation needs {package}: pip install "lusifer-hf[prepare]"')
