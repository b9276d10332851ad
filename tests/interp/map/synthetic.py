"""Component maps with known contents, in the form that `interp.map.component_map.component_map` returns."""

import json

import numpy as np
import xarray as xr

from interp.map.summary import summarise
from interp.results.files import provenance
from interp.statistics import mean_interval

ROLES = ("image", "question", "reasoning", "template", "decision", "all")


def _components(layers: int, heads: int, vision: int) -> list[tuple[str, str, int, int]]:
    rows = [(f"blocks.{i}.hook_resid_pre", "resid_pre", i, -1) for i in range(layers)]
    rows += [(f"blocks.{i}.attn", "attn_out", i, -1) for i in range(layers)]
    rows += [(f"blocks.{i}.mlp", "mlp_out", i, -1) for i in range(layers)]
    rows += [(f"blocks.{i}.attn.head.{h}", "head", i, h) for i in range(layers) for h in range(heads)]
    rows += [(f"vision.blocks.{i}", "vision", i, -1) for i in range(vision)]
    return [*rows, ("projector", "projector", -1, -1)]


def synthetic_map(layers=9, heads=4, vision=3, examples=48, seed=0, size=3.0):
    """A map whose change lies in the MLP of two thirds up and in its head 1, at the decision; the rest is noise.

    `size` is the mean denominator in nats. Random directions do as much as the patch of `blocks.1.attn` at the
    question, with the other sign; the change of the MLP is any example's, that of head 1 its own.
    The reasoning role is empty in every fifth example; vision has only the role "image".
    """
    rng = np.random.default_rng(seed)
    rows = _components(layers, heads, vision)
    names, points, layer, head = (np.array(column) for column in zip(*rows, strict=True))
    gap = rng.gamma(4.0, size / 4, examples)
    share = np.zeros((len(rows), len(ROLES)))
    top = 2 * layers // 3
    for i, (_, point, at, h) in enumerate(rows):
        decision = [ROLES.index("decision"), ROLES.index("all")]
        if point == "resid_pre":
            share[i, decision] = [min(1.0, at / layers) ** 3, 1.0]
            share[i, ROLES.index("reasoning")] = 0.5 * (1 - at / layers)
            share[i, ROLES.index("image")] = -0.15 * (1 - at / layers)
        if point == "mlp_out" and at == top:
            share[i, decision] = 0.42
        if point == "head" and (at, h) == (top, min(1, heads - 1)):
            share[i, decision] = 0.2
        if point == "attn_out" and at == 1:
            share[i, ROLES.index("question")] = 0.25
    noise = rng.normal(0, 0.15, (2, len(rows), len(ROLES), examples))
    effect = share[None, :, :, None] * gap + noise
    control = rng.normal(0, 0.15, effect.shape)
    random = rng.normal(0, 0.15, (2, *effect.shape))
    odd = names.tolist().index("blocks.1.attn")
    random[:, :, odd, ROLES.index("question")] -= 0.25 * gap
    whole = names.tolist().index(f"blocks.{top}.mlp")
    control[:, whole] = effect[:, whole] + rng.normal(0, 0.02, effect[:, whole].shape)
    effect[1] *= -1
    control[1] *= -1
    early = np.isin(points, ["vision", "projector"])
    for array in (effect, control, *random):
        array[:, early, 1:] = np.nan
        array[:, :, ROLES.index("reasoning"), ::5] = np.nan
    control[..., -1] = np.nan
    recipient = np.stack([-gap / 2, gap / 2])
    cells = ("direction", "component", "role", "example")
    return xr.Dataset(
        {
            "effect": (cells, effect),
            "control_random": (("draw", *cells), random),
            "control_other": (cells, control),
            "control_self": (("direction", "component"), np.zeros((2, len(rows)))),
            "recipient": (("direction", "example"), recipient),
            "donor": (("direction", "example"), -recipient),
        },
        coords={
            "direction": ["rl_to_in", "in_to_rl"],
            "component": names,
            "role": list(ROLES),
            "example": [f"sum-{i}" for i in range(examples)],
            "point": ("component", points),
            "layer": ("component", layer.astype(int)),
            "head": ("component", head.astype(int)),
        },
        attrs={
            "metric": "logit difference",
            "units": "nats",
        },
    )


def synthetic_noise(effects, pairs=4, size=0.12, seed=1):
    """Noise pairs of such a map: every cell's mean is drawn; attention at the question reaches 1 nat once."""
    rng = np.random.default_rng(seed)
    dims = ("noise_pair", "reading", "component", "role")
    shape = (pairs, 2, *(effects.sizes[name] for name in dims[2:]))
    means = rng.normal(0, size / 3, shape).clip(-size, size)
    names = effects["component"].to_numpy().tolist()
    means[2, 1, names.index("blocks.0.attn"), ROLES.index("question")] = -1.0
    coords = {"noise_pair": range(pairs), "reading": ["same", "own"]}
    coords |= {name: effects[name].to_numpy() for name in dims[2:]}
    return xr.Dataset({"noise_effect": (dims, means), "noise_n": (dims, np.full(shape, 16))}, coords=coords)


NULLS = {
    "bf16": mean_interval(np.linspace(-0.001, 0.002, 40)),
    "random": mean_interval(np.linspace(-0.03, 0.07, 40)),
    "random, own decisions": mean_interval(np.linspace(0.1, 0.3, 40)),
}
REFUSED = (
    "the denominator, 0.05 [0.04, 0.06], is not above that of a pair that learnt nothing "
    "(random), 0.02 [0.01, 0.04]"
)


def synthetic_result(refused="", **settings):
    """A summary with all that the page prints."""
    effects = synthetic_map(**settings)
    noise = synthetic_noise(effects)
    result = summarise(effects, noise=noise, nulls=NULLS, refused=refused)
    ends = effects["recipient"].sel(direction="rl_to_in"), effects["donor"].sel(direction="rl_to_in")
    low, high = (end.drop_vars("direction") for end in ends)
    corners = [[low, low + 0.4 * (high - low)], [low + 0.5 * (high - low), high]]
    result["two_by_two"] = xr.concat([xr.concat(row, "prefix") for row in corners], "weights").assign_coords(
        weights=["in", "rl"], prefix=["in", "rl"]
    )
    model = {"class": "Qwen2_5_VLForConditionalGeneration", "dtype": "torch.float32"}
    models = {
        name: model | {"name_or_path": f"experiments/embedded/{name}", "weights_sha256": (name * 40)[:64]}
        for name in ("in", "rl")
    }
    made = provenance(
        models, {"n": 600, "decision": "decisive", "seed": 0}, {"read": 600}, {"image missing": 2}
    )
    result.attrs["provenance"] = json.dumps(made)
    result.attrs["decisions"] = json.dumps(DECISIONS | {"n_qualify": effects.sizes["example"]})
    return result


DECISIONS = {
    "choice": "decisive",
    "n_prompts": 600,
    "n_diverge": 311,
    "n_qualify": 48,
    "excluded": {
        "RL is wrong": 170,
        "IN is right already": 351,
        "no single token of RL's makes IN end right": 31,
    },
    "n_in_correct": 365,
    "n_rl_correct": 430,
    "unparsed": {"in": {"no </think>": 4}, "rl": {}},
    "n_unstable_positions": 3,
    "denominator": {"value": 2.9, "low": 2.6, "high": 3.2, "n": 48},
    "units": "nats",
    "trace_index": {"min": 4.0, "quarter": 6.0, "median": 8.0, "three_quarters": 13.0, "max": 15.0},
    "roles": {"reasoning": 47, "answer": 1},
    "token_pairs": [
        {"rl": "3", "in": "2", "n": 11},
        {"rl": "<b>", "in": "4", "n": 7},
        {"rl": "1", "in": "2", "n": 6},
    ],
}
