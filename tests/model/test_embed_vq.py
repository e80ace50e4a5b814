"""Product-quantized token tables: exact where they can be, the same rows and logits either way, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import model
from model import config, product
from model.describe import describe
from model.schema import ConfigError

V, D = 61, 32


def build(rows: torch.Tensor | None = None, heads: Any = None, **embed: Any) -> model.LanguageModel:
    torch.manual_seed(0)
    source = {"dim": D, "stack": ["mlp"], "embed": embed}
    return model.build({**source, **({"heads": heads} if heads else {})}, vocab=V, table=rows).eval()


def rows(width: int = D) -> torch.Tensor:
    return torch.randn(V, width, generator=torch.Generator().manual_seed(1))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("width", [D, 48])
def test_as_many_codes_as_rows_is_exact(width):
    project = {} if width == D else {"project": D}
    plain = build(rows(width), **{"from": "smollm2-135m-instruct"}, **project)
    coded = build(rows(width), vq={"groups": 4, "codes": V}, **{"from": "smollm2-135m-instruct"}, **project)
    own = {k: v for k, v in plain.state_dict().items() if k != "embed.weight"}
    coded.load_state_dict(own, strict=False)
    x = ids(2, 7)
    torch.testing.assert_close(coded.embed.table(), plain.embed.table())
    torch.testing.assert_close(coded(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coded(x, labels=x).loss, plain(x, labels=x).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("embed", [{}, {"project": D, "from": "smollm2-135m-instruct"}, {"scale": 3.0}])
def test_gathered_logits_equal_dense_ones(embed):
    lm = build(rows(48) if "from" in embed else None, vq={"groups": 4, "codes": 8}, **embed)
    table, h = lm.embed.table(), torch.randn(2, 3, D)
    torch.testing.assert_close(lm.embed.logits(h, None), lm.embed.logits(h, table), rtol=1e-5, atol=1e-5)
    x = ids(2, 5)
    torch.testing.assert_close(lm.embed(x, None), lm.embed(x, table))


def test_k_means_finds_the_rows_that_there_are():
    few = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    many = few[torch.arange(200) % 5]
    books, codes = product.fit(many, 3, 16)
    torch.testing.assert_close(product.lookup(books, codes), many)
    noisy = torch.randn(300, 12, generator=torch.Generator().manual_seed(4))
    errors = [(product.lookup(*product.fit(noisy, 3, k)) - noisy).square().mean() for k in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[0] < noisy.square().mean()


def test_codes_from_scratch_tell_all_rows_apart():
    for vocab, groups, codes in ((61, 2, 8), (61, 6, 2), (1, 1, 2), (257, 16, 256)):
        found = product.assign(vocab, groups, codes)
        assert len(found.unique(dim=0)) == vocab and int(found.max()) < codes
    with pytest.raises(ConfigError, match=r"16 rows.*take more groups or codes"):
        build(vq={"groups": 2, "codes": 4})


def test_tables_are_trained_and_codes_are_not():
    lm = build(vq={"groups": 4, "codes": 8}).train()
    x = ids(2, 9)
    codes = lm.embed.codes.clone()
    before = lm(x, labels=x).loss
    optimizer = torch.optim.SGD(lm.parameters(), 1.0)
    for _ in range(5):
        loss = lm(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert lm(x, labels=x).loss < before and torch.equal(codes, lm.embed.codes)
    assert lm.embed.weight.grad.count_nonzero() > 0
    assert not build(vq={"groups": 4, "codes": 8}, frozen=True).embed.weight.requires_grad


def test_a_saved_model_is_read_back_without_its_source(tmp_path):
    lm = build(rows(48), vq={"groups": 4, "codes": 8}, project=D, **{"from": "smollm2-135m-instruct"})
    save_file(lm.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(config.dumps(lm.config))
    x = ids(1, 6)
    assert torch.equal(model.load(tmp_path)(x).logits, lm(x).logits)


def test_show_counts_bits():
    arch = {"dim": 64, "vocab": 1000, "stack": ["mlp"], "embed": {"vq": {"groups": 16, "codes": 256}}}
    found = describe(config.load(arch))
    note = next(n for n in found.sites[0].notes if "codes" in n)
    assert note == "16 codes of 8 bits a row; 79.6 KiB with their tables, 250 KiB whole"
    assert found.sites[0].parameters == 16 * 256 * 4
    assert found.lm.embed.stored_bits == 32 * 16 * 256 * 4 + 1000 * 16 * 8


def test_groups_must_divide_the_width():
    with pytest.raises(ConfigError, match="groups: 5 must divide the rows' width 32"):
        build(vq={"groups": 5})
