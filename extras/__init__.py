"""What the tutorial does without. Each file has one job and is imported only where it is used."""
