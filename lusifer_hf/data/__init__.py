"""What training reads: mixtures of data sets, their batches and their collators."""
