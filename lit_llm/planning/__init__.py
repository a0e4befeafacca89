"""What a run will cost, found without training and without loading weights."""
