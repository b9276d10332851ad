"""The hook names on nnsight's own wrapped models, for runs on a remote server: `RemoteVLM("org/model")`.

Here nnsight serves what it can reach, which is what modules take and return. Absent are the points inside an attention
module (`hook_rot_q`, `hook_rot_k`, `hook_attn_scores`, `hook_pattern`) and `hook_result`, which is no tensor of the
forward pass (take `hook_z` and the head's W_O), what a block adds where no module gives it out, and what is multiplied
by a parameter; HookedVLM reaches them. Tensors have the axes that their modules give them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
from nnsight import TransformersModel

from hooks.anatomy import Anatomy
from hooks.errors import FrankenlensError
from hooks.nnsight.names import Place, get, put
from hooks.points import hook_point_table

nnsight.register("hooks")  # a server that lacks this package is sent what a trace needs of it

_INSIDE = "it is computed inside {}, and nnsight serves what modules take and return; HookedVLM reaches it."
_DERIVED = (
    "no tensor of the forward pass holds it: take hook_z and the head's slice of {}'s weight, or HookedVLM."
)
_REST = (
    "no module gives it out: it is what {} makes of the stream behind one of its parts; HookedVLM reaches it."
)
_FACTOR = (
    "what {} gives out is multiplied by the parameter {}, which stays on the server; HookedVLM reaches it."
)
_EXPERTS = "it is made of what {} is given and gives out for all tokens in a row; HookedVLM reaches it."


def native_places(anatomy: Anatomy, root: str = "model") -> dict[str, Place | str]:
    """Name → where nnsight serves the hook point on a module that it has wrapped, or why it cannot.

    Args:
        anatomy: of the wrapped model.
        root: nnsight's path of the whole model.
    """
    places: dict[str, Place | str] = {}
    for name, p in hook_point_table(anatomy).items():
        if p.experts is not None:
            places[name] = _EXPERTS.format(p.module)
        elif p.place in ("attention", "result"):
            places[name] = (_INSIDE if p.place == "attention" else _DERIVED).format(p.module)
        elif p.place == "rest":
            places[name] = _REST.format(p.module)
        elif isinstance(p.coefficient, str):
            places[name] = _FACTOR.format(p.module, p.coefficient)
        else:
            where = f"{root}.{p.module}.{p.place}"
            places[name] = Place(where, p.place, p.key, p.split, p.inplace, p.moved, p.coefficient)
    return places


class RemoteVLM(TransformersModel):
    """A VLM of the hub whose weights stay where they are; the hook names work in its traces.

    `trace(inputs, remote=True)` and `session(remote=True)` are nnsight's own and run on its server; without `remote`,
    nnsight loads the weights here and wraps its copy of the model.

    Args:
        repo_id: repository id on the hub.
        kwargs: passed to `nnsight.TransformersModel`.

    Raises:
        FrankenlensError: `remote` is set for a folder, which a server cannot know; or the architecture is unknown.
    """

    def __init__(self, repo_id: str | Path, **kwargs: Any) -> None:
        from hooks.processors import load_processor
        from hooks.unopened import unopened_anatomy

        kwargs.setdefault("task", "image-text-to-text")
        if "processor" not in kwargs:
            kwargs["processor"] = load_processor(repo_id)
        super().__init__(str(repo_id), **kwargs)
        self._places = native_places(unopened_anatomy(self._module, kwargs["processor"]), self.path)

    def trace(self, inputs: Any = None, *, remote: Any = False, **kwargs: Any) -> Any:
        """nnsight's trace of processor tensors, here or on its server."""
        self._require_known(remote)
        return super().trace(**dict(inputs or {}), remote=remote, **kwargs)

    def session(self, *args: Any, remote: Any = False, **kwargs: Any) -> Any:
        """nnsight's session, here or on its server."""
        self._require_known(remote)
        return super().session(*args, remote=remote, **kwargs)

    def _require_known(self, remote: Any) -> None:
        if remote is True and Path(self.repo_id).exists():
            raise FrankenlensError(
                f"remote=True: {self.repo_id} is a folder of this machine and a server knows models by their "
                "repository id; give the id, or leave `remote` out."
            )

    @classmethod
    def _remoteable_class(cls) -> type:
        return TransformersModel

    @property
    def blocks(self) -> Any:
        """Hook points of the decoder's blocks."""
        return get("blocks", self._places)

    @property
    def vision(self) -> Any:
        """Hook points of the vision tower."""
        return get("vision", self._places)

    @property
    def projector(self) -> Any:
        """Hook points of the projector."""
        return get("projector", self._places)

    @property
    def ln_final(self) -> Any:
        """Hook points of the final norm."""
        return get("ln_final", self._places)

    @property
    def hook_embed(self) -> Any:
        """What the decoder reads, image features included."""
        return get("hook_embed", self._places)

    @hook_embed.setter
    def hook_embed(self, value: Any) -> None:
        put("hook_embed", value, self._places)
