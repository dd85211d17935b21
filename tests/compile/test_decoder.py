"""The decoder compiles to one graph, without and with a cache."""

import pytest
import torch

from tests.helpers import tiny


@pytest.mark.parametrize("changes", [{}, {"windows": (None, 3)}, {"rope": None}])
def test_one_graph_without_breaks(changes):
    model = tiny(**changes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(0, 29, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), model(ids))
        ours, theirs = model.new_cache(3, 23), model.new_cache(3, 23)
        for cache, run in ((ours, model), (theirs, compiled)):
            run(ids, cache)
            cache.commit(torch.tensor([7, 2, 5]), known=[7, 2, 5])
        torch.testing.assert_close(compiled(ids[:, :2], theirs), model(ids[:, :2], ours))
        explained = torch._dynamo.explain(model)(ids, model.new_cache(3, 23))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
