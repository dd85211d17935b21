"""Language models compile to one graph, without and with a cache."""

import pytest
import torch

from tests.helpers import tiny, tiny_t5


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


def test_one_graph_of_an_encoder_decoder():
    model = tiny_t5()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, text = torch.randint(0, 29, (3, 7)), torch.randint(0, 29, (3, 5))
    sources = [[1, 2, 3], [4], [5, 6]]
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, text), model(ids, text))
        ours, theirs = model.new_cache(3, 23), model.new_cache(3, 23)
        for cache, run in ((ours, model), (theirs, compiled)):
            model.read(sources, cache)
            run(text, cache=cache)
            cache.commit(torch.tensor([5, 2, 4]), known=[5, 2, 4])
        torch.testing.assert_close(compiled(text[:, :2], cache=theirs), model(text[:, :2], cache=ours))
        explained = torch._dynamo.explain(model)(text[:, :2], cache=ours)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
