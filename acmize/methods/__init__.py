"""One method, one file; each registers its config class with `acmize.registry` when it is imported here."""

from acmize.methods import acm, ada_pconv, cosine_gate, lag
