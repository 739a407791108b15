"""TokenTransformer: causality, the cache, class tokens, tied logits, initialisation, configuration."""

import json
import math

import pytest
import torch

from imagewright.models.description import build, describe
from imagewright.networks import TokenTransformer, TokenTransformerConfig
from imagewright.noise import dropout
from imagewright.types import UNCONDITIONAL, Condition, UserError

NORMS = pytest.mark.parametrize("post_norm", [True, False])


def tiny(**changes) -> TokenTransformer:
    """A small float64 network with weights so large that everything has an influence."""
    arguments = {
        "values": 5,
        "length": 8,
        "channels": 2,
        "label_dim": 3,
        "width": 16,
        "depth": 2,
        "heads": 4,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    net = TokenTransformer(TokenTransformerConfig(**(arguments | changes))).double().eval()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


def tokens(n: int = 3, length: int = 8, values: int = 5) -> torch.Tensor:
    return torch.randint(values, (n, length), generator=torch.Generator().manual_seed(1))


@NORMS
def test_a_causal_place_sees_those_before_and_no_other(post_norm):
    net, sequence = tiny(causal=True, post_norm=post_norm), tokens()
    before = net(sequence)
    for place in range(8):
        changed = sequence.clone()
        changed[:, place] = (changed[:, place] + 1) % 5
        after = net(changed)
        torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], rtol=0, atol=0)
        if place < 7:
            assert ((after - before)[:, place + 1 :].abs().amax(2) > 1e-6).all()


@NORMS
def test_a_bidirectional_place_sees_all(post_norm):
    net, sequence = tiny(causal=False, post_norm=post_norm), tokens()
    before = net(sequence)
    for place in range(8):
        changed = sequence.clone()
        changed[:, place] = 5  # unknown
        assert ((net(changed) - before).abs().amax(2) > 1e-6).all()


@NORMS
def test_the_cache_changes_no_logit(post_norm):
    net, sequence = tiny(causal=True, post_norm=post_norm), tokens()
    cond = Condition(label=torch.tensor([2, -1, 0]))
    whole = net(sequence, None, cond)
    cache = net.start(cond, 3)
    steps = [net.step(None if i == 0 else sequence[:, i - 1], cache) for i in range(8)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="place 8 of 8"):
        net.step(sequence[:, -1], cache)


def test_the_cache_is_asked_in_order_and_of_causal_networks_only():
    net = tiny(causal=True)
    with pytest.raises(ValueError, match="place 0"):
        net.step(torch.zeros(1, dtype=torch.int64), net.start(n=1))
    with pytest.raises(UserError, match="no cache"):
        tiny().start(n=1)


@pytest.mark.parametrize("causal", [True, False])
def test_every_class_has_a_token_of_its_own_and_so_has_none(causal):
    net, sequence = tiny(causal=causal), tokens(1).expand(4, -1)
    logits = net(sequence, None, Condition(label=torch.tensor([0, 1, 2, -1])))
    for i in range(4):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().amax(1).min() > 1e-6
    torch.testing.assert_close(net(sequence)[3], logits[3], rtol=0, atol=0)
    with pytest.raises(UserError, match="label 3 is no class; they are 0 to 2"):
        net(sequence, None, Condition(label=torch.tensor([0, 1, 2, 3])))
    without = tiny(causal=causal, label_dim=0)
    torch.testing.assert_close(without(sequence, None, Condition(label=torch.tensor([7] * 4))), without(sequence))


def test_a_causal_place_is_told_its_row_column_and_channel_and_the_class():
    """With the blocks silenced an answer depends on the token before and what the place itself is told."""
    net = tiny(causal=True, post_norm=False)
    for block in net.blocks:
        for layer in (block.out, block.down):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    alike = torch.full((1, 8), 3)
    rows, columns, channels = net.positions
    assert [len(table) for table in net.positions] == [2, 2, 2]
    base = net(alike)
    for table, told in ((rows, [4, 5, 6, 7]), (columns, [2, 3, 6, 7]), (channels, [1, 3, 5, 7])):
        before = table.data[1].clone()
        table.data[1] += torch.linspace(1, 2, 16)  # not even: the norm takes even shifts away
        moved = (net(alike) != base).any(2)[0]
        assert moved.nonzero().flatten().tolist() == told
        table.data[1] = before
    other = net(alike, None, Condition(label=torch.tensor([1])))
    assert (other != base).any(2).all()
    first = net(torch.full((1, 8), 2), None, Condition(label=torch.tensor([1])))
    assert torch.equal(first[:, 0], other[:, 0]) and (first != other)[:, 1:].any(2).all()


def test_the_logits_are_tied_to_the_values_vectors_alone():
    net, sequence = tiny(), torch.full((1, 8), 5)  # unknown everywhere: the values enter by the head alone
    before = net(sequence)
    net.tokens.weight.data[2] *= 2
    after = net(sequence)
    torch.testing.assert_close(after[..., 2] - net.bias[2], 2 * (before[..., 2] - net.bias[2]))
    others = [0, 1, 3, 4]
    torch.testing.assert_close(after[..., others], before[..., others], rtol=0, atol=0)


def test_the_published_size():
    config = TokenTransformerConfig(values=1024, length=256, label_dim=1000)
    with torch.device("meta"):
        count = sum(p.numel() for p in TokenTransformer(config).parameters())
    block = 4 * 768**2 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    # 1024 codes, the unknown token, 1000 classes; and ours for no class.
    assert count == 2026 * 768 + 257 * 768 + 2 * 768 + 24 * block + 768**2 + 768 + 2 * 768 + 1024


def test_initialisation_is_a_cut_normal_and_answers_almost_evenly():
    torch.manual_seed(0)
    net = TokenTransformer(TokenTransformerConfig(values=50, length=16, width=64, depth=4, heads=4, causal=True))
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    weight = torch.cat([p.detach().flatten() for n, p in net.named_parameters() if n.endswith("qkv.weight")])
    assert weight.abs().max() <= 0.04
    assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)  # standard deviation of a normal cut at 2
    with torch.no_grad():
        cross_entropy = float(-torch.log_softmax(net.eval()(tokens(4, 16, 50)), 2).mean())
    assert cross_entropy == pytest.approx(math.log(50), abs=0.05)
    pre = TokenTransformer(TokenTransformerConfig(values=5, length=4, width=64, depth=8, heads=4, post_norm=False))
    assert float(pre.blocks[0].down.weight.detach().std()) == pytest.approx(0.02 * 0.8796 / 4, rel=0.05)


def test_dropout_acts_in_training_alone():
    net = tiny(dropout=0.5)
    sequence = tokens()
    torch.testing.assert_close(net(sequence), net(sequence), rtol=0, atol=0)
    net.train()
    assert not torch.equal(net(sequence), net(sequence))


def test_dropout_is_on_the_embedding_every_branch_and_the_attentions_weights(monkeypatch):
    elsewhere, within = [], []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "imagewright.networks.token_transformer.dropout",
        lambda x, p, training: elsewhere.append((p, training)) or dropout(x, p, training),
    )
    monkeypatch.setattr(
        "imagewright.networks.residual.dropout",
        lambda x, p, training: elsewhere.append((p, training)) or dropout(x, p, training),
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv, dropout_p=0.0, **more: within.append(dropout_p) or attention(*qkv, dropout_p=dropout_p, **more),
    )
    tiny(dropout=0.25).train()(tokens())
    assert elsewhere == [(0.25, True)] * 5 and within == [0.25] * 2  # of two blocks


def test_it_describes_itself():
    net = tiny(causal=True, post_norm=False)
    again = build(json.loads(json.dumps(describe(net))))
    assert again.config == net.config
    again.double().load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(tokens()), net(tokens(), None, UNCONDITIONAL), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heads": 3}, "heads is 3; it must be a divisor of width, 16"),
        ({"values": 1}, "values is 1"),
        ({"length": 0}, "length is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"depth": True}, "depth is True"),
        ({"causal": True, "length": 6}, "length is 6; it must be a square number times channels, 2"),
    ],
)
def test_a_wrong_value_is_named(change, match):
    with pytest.raises(UserError, match=match):
        tiny(**change)


def test_another_number_of_tokens_is_named():
    with pytest.raises(UserError, match=r"tokens are \[3, 5\]; this network takes \[N, 8\]"):
        tiny()(tokens()[:, :5])
