"""Weights rearranged while replies are sampled (cleanalign/packed.py): the same numbers, nothing left behind."""

import pytest
import tiny
import torch
import torch.nn.functional as F

import common
from cleanalign import packed as room
from cleanalign.models import backbone, head, head_logits

CPU = torch.device("cpu")


@pytest.fixture
def model():
    made = tiny.model(48).bfloat16()
    if not room.can_pack(CPU, torch.bfloat16):
        pytest.skip("this CPU or this torch has no bfloat16 product with rearranged weights")
    return made


def logits_of(model, ids):
    with torch.no_grad():
        hidden = backbone(model)(input_ids=ids).last_hidden_state
        return head_logits(hidden, *head(model)).float()


def own_forwards(model) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("rows", [1, 3, 24])
def test_packed_layers_compute_what_linear_computes(model, rows):
    x = torch.randn(rows, 5, 32).bfloat16()
    for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.in_features == 32]:
        bias = torch.randn(layer.out_features).bfloat16()
        for b in (None, bias):
            product = room.product_with(layer.weight, b)(x)
            torch.testing.assert_close(product, F.linear(x, layer.weight, b), atol=1e-2, rtol=1e-2)


def test_packed_model_computes_what_it_did_and_is_itself_again(model):
    ids = torch.randint(4, 48, (3, 7))
    expected = logits_of(model, ids)
    with room.packed(model, rows=3, products=100):
        assert own_forwards(model) == 14
        torch.testing.assert_close(logits_of(model, ids), expected, atol=0.05, rtol=0.02)
    assert own_forwards(model) == 0
    with pytest.raises(KeyError), room.packed(model, rows=3, products=100):
        raise KeyError
    assert own_forwards(model) == 0 and torch.equal(logits_of(model, ids), expected)


def test_packed_weights_are_those_on_entry(model):
    """What makes it wrong to keep them while the policy trains."""
    ids = torch.randint(4, 48, (3, 7))
    with room.packed(model, rows=3, products=100), torch.no_grad():
        before = logits_of(model, ids)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
        assert torch.equal(logits_of(model, ids), before)
    assert not torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("rows, products", [(3, 2), (room.FEW + 1, 100)])
def test_few_products_or_many_rows_are_not_worth_it(model, rows, products):
    with room.packed(model, rows, products):
        assert own_forwards(model) == 0


def test_float32_is_left_alone():
    made = tiny.model(48)
    with room.packed(made, rows=3, products=100):
        assert own_forwards(made) == 0


def test_sampling_packs_and_unpacks(model, monkeypatch):
    seen = []
    kept = room.packed

    def noting(*args, **kwargs):
        seen.append(kwargs)
        return kept(*args, **kwargs)

    monkeypatch.setattr(common, "packed", noting)
    prompts = [[5, 6, 7], [8, 9]]
    common.sample(model, prompts, [3], completions=2, max_new_tokens=12, seed=1)
    assert seen == [{"rows": 4, "products": 12}] and own_forwards(model) == 0
