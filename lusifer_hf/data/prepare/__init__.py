"""From raw text to training data: import, clean, deduplicate, decontaminate, mine negatives, cluster, sample."""

try:
    import datasets  # noqa: F401
    import faiss  # noqa: F401
    import rensa  # noqa: F401
except ImportError as error:
    raise ImportError(f'Data preparation needs {error.name}: pip install "lusifer-hf[prepare]"') from error
