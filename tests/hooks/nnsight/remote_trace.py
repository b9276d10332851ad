"""A remote trace against a server that is played here: what is sent, and that it runs where this package is missing."""

from __future__ import annotations

import pickletools
import sys
from typing import Any

import torch
from nnsight.intervention.backends import remote
from nnsight.modeling import huggingface
from nnsight.schema.request import RequestModel

from hooks import FrankenlensError, HookedVLM
from hooks.nnsight.remote import RemoteVLM
from hooks.selfcheck import check_inputs


class Server:
    """Takes what nnsight would send, lets it travel, and runs it on its own copy of the model."""

    model: Any = None
    sent: tuple[str, bytes]

    def __init__(self, key: str, **_: Any) -> None:
        self.key = key

    def __call__(self, tracer: Any) -> None:
        self.model.dispatch()
        blob = RequestModel.serialize(tracer)
        Server.sent = self.key, blob
        known = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "hooks"}
        sys.modules["hooks"] = None  # type: ignore[assignment]  # importing it fails
        try:
            arrived = RequestModel.deserialize(blob, self.model._remoteable_persistent_objects())
        finally:
            sys.modules.update(known)
        arrived.execute(arrived.info.code)
        tracer.info.frame.f_locals["got"].update(arrived.info.frame.f_locals["got"])


def main(folder: str) -> None:
    """Prints refused, sent, equal."""
    try:
        RemoteVLM(folder).trace({}, remote=True)
    except FrankenlensError:
        print("refused")
    vlm, Server.model = RemoteVLM(folder), RemoteVLM(folder)
    vlm.repo_id = "someone/in"
    huggingface._ID_CACHE["someone/in"] = "someone/in"
    remote.RemoteBackend = Server
    here = HookedVLM.from_pretrained(folder)
    inputs, got = check_inputs(here.processor), {}
    with vlm.trace(inputs, remote=True):
        got["z"] = vlm.blocks[1].attn.hook_z
        vlm.blocks[1].attn.hook_z[:, :, 0] = 0
        got["post"] = vlm.blocks[1].hook_resid_post
    key, blob = Server.sent
    names = [str(arg) for op, arg, _ in pickletools.genops(blob) if op.name in ("GLOBAL", "SHORT_BINUNICODE")]
    assert key.startswith("nnsight.modeling.transformers.TransformersModel:") and "someone/in" in key
    print("sent", len(blob), [n for n in names if n.startswith("hooks")], file=sys.stderr)
    print("sent")
    with torch.no_grad(), here.trace(inputs):
        z = here.blocks[1].attn.hook_z.save()
        here.blocks[1].attn.hook_z[:, :, 0] = 0
        post = here.blocks[1].hook_resid_post.save()
    if torch.equal(got["z"], z) and torch.equal(got["post"], post):
        print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
