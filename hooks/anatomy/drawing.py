"""An anatomy as a person would draw it: towers from the pixels to the words, alike blocks together."""

from __future__ import annotations

from collections.abc import Iterator

from hooks.anatomy.nouns import Anatomy, Block, Tower, Writer


def drawn(anatomy: Anatomy) -> str:
    """A few lines of text."""
    lines: list[str] = []
    for prefix, tower in reversed(list(anatomy.towers.items())):
        if not prefix and anatomy.projector:
            lines.append(f"projector    {anatomy.projector_weights}")
        lines += _tower(prefix.rstrip(".") or "text", tower)
    if anatomy.deepstack:
        lines.append(
            "             image features added behind blocks " + ", ".join(map(str, anatomy.deepstack))
        )
    after = f", soft cap {anatomy.softcap:g}" if anatomy.softcap else ""
    after += f", times {anatomy.scale:g}" if anatomy.scale != 1 else ""
    lines.append(f"ln_final     {anatomy.final_norm or '(not found)'}")
    lines.append(f"unembed      {anatomy.unembed or '(not found)'}{after}")
    lines += [f"no {part}: {why}" for part, why in anatomy.absent.items()]
    return "\n".join(lines)


def _tower(name: str, tower: Tower) -> Iterator[str]:
    packed = ", packed" if tower.packed else ""
    yield f"{name:<12} {tower.path}: {len(tower.blocks)} blocks, width {tower.width}{packed}"
    runs: list[tuple[int, int, str]] = []
    for layer, block in enumerate(tower.blocks):
        text = _block(block)
        if runs and runs[-1][2] == text:
            runs[-1] = (runs[-1][0], layer, text)
        else:
            runs.append((layer, layer, text))
    for first, last, text in runs:
        layers = f"{first}" if first == last else f"{first}-{last}"
        yield f"  {layers:>9}  {text}"


def _block(block: Block) -> str:
    if block.writers:
        gain = "" if block.gain == 1.0 else f", all times {_short(block, block.gain)}"
        return " ".join(f"+ {_writer(block, writer)}" for writer in block.writers) + gain
    heads = ", ".join(f"{s.n_heads} heads" for s in block.sites)
    return f"(stream alone{f'; attends, {heads}' if heads else ''}) {block.why}".rstrip()


def _short(block: Block, coefficient: float | str) -> str:
    """A number, or a parameter's name within the block."""
    if isinstance(coefficient, str):
        return coefficient.replace(f"{block.path}.", "")
    return f"{coefficient:g}"


def _writer(block: Block, writer: Writer) -> str:
    text = writer.role
    if (site := writer.site) is not None:
        shared = f", {site.n_kv_heads} kv" if site.n_kv_heads != site.n_heads else ""
        text += f"({site.n_heads} heads{shared} of {site.d_head})"
    if writer.experts is not None:
        text += f"({writer.experts.n_experts} experts)"
    if writer.module != writer.body and not writer.rest:
        text += " after a norm"
    if writer.coefficient != 1.0:
        text += f" times {_short(block, writer.coefficient)}"
    if writer.state == 0 and block.writers.index(writer):
        text += " beside"
    return text
