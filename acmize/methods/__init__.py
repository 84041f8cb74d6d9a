"""One method, one file; each registers its config class with `acmize.registry`."""
