"""Where one model keeps its parts.

`find_anatomy` reads the module tree by the names that Hugging Face uses, and is what `HookedVLM` opens with.
`hooks.anatomy.observed` watches a forward pass instead, knows no names, and proves what it says as equations; the
architectures that it reads are many more.
"""

from hooks.anatomy.by_names import Anatomy, Block, Tower, find_anatomy

__all__ = ["Anatomy", "Block", "Tower", "find_anatomy"]
