"""From raw text to training data: import, clean, deduplicate, decontaminate, mine negatives, cluster, sample."""
