"""The parts of `FederatedAveraging`, a subject each: rounds by hand, previews, personal models, comparing."""
