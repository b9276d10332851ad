"""Both models of a pair steered: IN towards RL, RL away from itself."""

from typing import Any

import numpy as np
import pandas as pd

from interp.lockstep import EVERYWHERE
from interp.pair.generation import greedy
from interp.questions.tasks import sample
from interp.steering import (
    differences,
    dose_response,
    dose_table,
    mean_difference,
    pair_directions,
    steer_both,
)

SITE = "blocks.6.hook_resid_post"
RUNNING: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 8}
USED, FRESH = sample("sum", 4, 1, "map"), sample("sum", 5, 2, "map")


def test_directions_are_the_differences_along_rls_traces(pair) -> None:
    mean, first = pair_directions(pair, USED, SITE, EVERYWHERE, **RUNNING)
    assert (mean.name, first.name, mean.site) == ("mean", "pc 1", SITE)
    prompts = [pair.builder.build(example) for example in USED]
    written = zip(prompts, greedy(pair.rl, prompts, 12), strict=True)
    found = differences(pair, [prompt.with_tokens(ids) for prompt, ids in written], SITE, EVERYWHERE, 8)
    np.testing.assert_allclose(mean.vector, mean_difference(found, SITE).vector, atol=1e-5)
    assert mean.norm > 0


def test_rl_gets_the_coefficients_with_the_other_sign(pair) -> None:
    directions = pair_directions(pair, USED, SITE, EVERYWHERE, **RUNNING)
    settings: dict[str, Any] = {**RUNNING, "n_random": 1, "progress": False}
    found, table = steer_both(pair, FRESH, directions, (1.0, 2.0), seed=4, **settings)
    assert table.groupby("model")["coefficient"].unique().map(sorted).to_dict() == {
        "IN": [1.0, 2.0],
        "RL": [-2.0, -1.0],
    }
    for name, vlm, signed in (("IN", pair.in_, (1.0, 2.0)), ("RL", pair.rl, (-1.0, -2.0))):
        alone = dose_response(vlm, pair.builder, FRESH, directions, signed, seed=4, **settings)
        own = table.loc[table["model"] == name].drop(columns="model").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, dose_table(alone))
        np.testing.assert_array_equal(found[f"steered_{name}_right"], alone["right"])
        assert found[f"coefficient_{name}"].to_numpy().tolist() == list(signed)
