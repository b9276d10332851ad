"""What a model is made of, found by watching it: towers, blocks, writers, attention sites, and what stands around."""

from hooks.anatomy.nouns import Absent, Anatomy, Block, Experts, Role, Site, Slice, Tower, Writer
from hooks.anatomy.observed import observed_anatomy as find_anatomy

__all__ = [
    "Absent",
    "Anatomy",
    "Block",
    "Experts",
    "Role",
    "Site",
    "Slice",
    "Tower",
    "Writer",
    "find_anatomy",
]
