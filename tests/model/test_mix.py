"""`mix`: parallel mixers at one site."""

from __future__ import annotations

import pytest
import torch

import model
from model.schema import ConfigError

OF = [{"mamba2": {"head_dim": 16, "state": 4}}, {"deltanet": {"heads": 2}}]


def test_sum_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    mix = model.make_block("mix", 32, of=OF, combine="sum").double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        mix.scale[1] = 0.5
    want = mix.parts[0](x).y + 0.5 * mix.parts[1](x).y
    torch.testing.assert_close(mix(x).y, want)


def test_norm_does_not_see_a_branchs_scale() -> None:
    """A branch that is a thousand times louder counts as before; the mean is of unit scale."""
    torch.manual_seed(0)
    mix = model.make_block("mix", 32, of=OF).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    before = mix(x).y
    with torch.no_grad():
        mix.parts[1].o_proj.weight *= 1000
    torch.testing.assert_close(mix(x).y, before, rtol=1e-2, atol=1e-2)


def test_only_the_last_matrix_writes_to_the_stream() -> None:
    from model.bank import residual_outputs

    mix = model.make_block("mix", 32, of=OF)
    assert residual_outputs(mix) == [mix.o_proj]
    assert len(residual_outputs(model.make_block("mix", 32, of=OF, combine="sum"))) == 2


def test_defaults_reach_the_branches_and_mistakes_have_their_line(tmp_path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text(
        "dim: 32\ndefaults: {mamba2: {head_dim: 16, state: 4}}\n"
        "stack: [{mix: {of: [mamba2, {deltanet: {heads: 2}}]}}]\n"
    )
    config = model.config.load(good)
    assert config.stack[0].params["of"] == [
        {"mamba2": {"head_dim": 16, "state": 4}},
        {"deltanet": {"heads": 2}},
    ]
    assert model.config.load(model.config.dump(config)) == config
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "dim: 32\nstack:\n"
        "  - mix: {of: [mamba2, {deltanet: {headz: 2}}]}\n"
        "  - mix: {of: [{mamba2: {head_dim: 24}}, mlp]}\n"
        "  - mix: {of: [mlp]}\n"
        "  - mix: {of: [mlp, {samba: {mamba2: {head_dim: 16}, swa: {head_dim: 16}}}]}\n"
        "  - mix: {of: [mlp, {mlp: {}, swa: {}}, nlp]}\n"
    )
    with pytest.raises(ConfigError) as error:
        model.config.load(bad)
    lines = str(error.value).splitlines()
    for line, (place, says) in zip(
        lines,
        [
            ("bad.yaml:3:", "unknown key 'headz'"),
            ("bad.yaml:4:", "of[0].mamba2: head_dim=24 must divide"),
            ("bad.yaml:5:", "at least two blocks"),
            ("bad.yaml:6:", "samba brings its own residual"),
            ("bad.yaml:7:", "want one block"),
            ("bad.yaml:7:", "no block called 'nlp'; did you mean 'mlp'?"),
        ],
        strict=True,
    ):
        assert place in line and says in line


def test_a_model_with_a_mix_streams() -> None:
    torch.manual_seed(0)
    lm = model.build({"dim": 32, "stack": [{"mix": {"of": OF}}, "mlp"]}, vocab=20).double().eval()
    ids = torch.randint(20, (2, 12))
    state = lm.init_state(2, dtype=torch.float64)
    first = lm(ids[:, :5], state=state)
    rest = lm(ids[:, 5:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), lm(ids).logits)
