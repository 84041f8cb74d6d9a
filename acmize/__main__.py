"""`python -m acmize`, and so `accelerate launch -m acmize`."""

from acmize.cli import main

main()
