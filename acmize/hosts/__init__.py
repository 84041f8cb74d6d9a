"""Where a model can be made adaptive. The only package that knows class names of timm and transformers.

Classes are matched exactly: a subclass may read a layer's `.weight` past its forward, as BEiT's attention does, so what
is not known is refused by name with the reason. A user's own module is converted by naming its sites.
"""

from acmize.hosts.planning import example_input, make_plan
from acmize.hosts.sites import find_sites, parse_targets

__all__ = ["example_input", "find_sites", "make_plan", "parse_targets"]
