"""What travels and how it combines: named tensors in, named tensors out. Knows no participant, round or runtime."""
