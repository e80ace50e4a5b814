"""Onions: the plan is the mission's, insertion changes no logit, frozen stays frozen, growth is by name."""

import pytest
import torch

import model
from model.grow import load_into
from model.schema import (
    Blend,
    BlockNode,
    Config,
    EmbedConfig,
    HeadConfig,
    OnionNode,
    QuantSpec,
    RepeatNode,
    ShellNode,
)
from model.sections import GrowConfig

V, D, T = 61, 32, 24
SWA = BlockNode("swa", {"head_dim": 16, "window": 5})
BODY = [BlockNode("mamba2", {"state": 16, "head_dim": 16}), BlockNode("mlp", {}), SWA]
HEADS = {"recon": HeadConfig(0), "next": HeadConfig(1), "second": HeadConfig(2, 0.5, {"act": "rwkv"})}


def shell(n: int, **options) -> ShellNode:
    return ShellNode(f"s{n}", BODY, to=8, **options)


def onion(*shells: ShellNode, reading: str = "split", **options) -> model.LanguageModel:
    torch.manual_seed(0)
    config = Config(dim=D, stack=[OnionNode(list(shells), reading)], heads=HEADS, name="onion", **options)
    return model.build(config, vocab=V)


def tokens(batch: int = 2, time: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, time), generator=torch.Generator().manual_seed(1))


def grown(reading: str, dtype: torch.dtype | None = None):
    """Stage 1 a few steps in, and stage 2 and 3 grown from it."""
    one = onion(shell(1), reading=reading)
    train(one, 3)
    two = onion(shell(1, frozen=True), shell(2, blend=Blend(steps=4)), reading=reading)
    load_into(two, one.config, one.state_dict())
    return one, two


def train(lm: model.LanguageModel, steps: int, lr: float = 1e-2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=lr)
    x = tokens()
    lm.train()
    for step in range(steps):
        lm.advance(step)
        optimizer.zero_grad()
        lm(x, labels=x).loss.backward()
        optimizer.step()
    return optimizer


def test_sites_are_the_missions():
    lm = onion(shell(1), shell(2), shell(3))
    order = [item.module for item in lm.plan.walk() if item.site.split(".")[1] != "fade"]
    visits = [m.split("_")[0] for m in order if m.endswith("swa")]
    assert visits == ["s1", "s2", "s3", "s3", "s2", "s1"]
    assert len({id(m) for m in lm.bank.values()}) == len(lm.plan.modules)
    assert lm.plan.sites()["s1.in.s1_0_mamba2"] == lm.plan.sites()["s1.out.s1_0_mamba2"] == "s1_0_mamba2"


@pytest.mark.parametrize("reading", ["split", "whole"])
@pytest.mark.parametrize("bf16", [False, True])
def test_insertion_changes_no_logit(reading, bf16):
    one, two = grown(reading)
    one.eval(), two.eval()
    x = tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        for name in HEADS:
            assert torch.equal(one.nll(x)[name].nan_to_num(), two.nll(x)[name].nan_to_num())
        assert torch.equal(one(x).logits, two(x).logits)
    two.advance(2)  # negative control: half faded in, the new shell must be heard
    with torch.no_grad():
        assert not torch.equal(one(x).logits, two(x).logits)


@pytest.mark.parametrize("reading", ["split", "whole"])
def test_third_stage_inserts_into_the_second(reading):
    _, two = grown(reading)
    train(two, 6)  # the fade of s2 is complete
    shells = shell(1, frozen=True), shell(2, frozen=True), shell(3, blend=Blend(steps=4))
    three = onion(*shells, reading=reading)
    report = load_into(three, two.config, two.state_dict())
    assert all(n.startswith("bank.s3_") for n in report.fresh) and report.fresh
    assert not report.dropped and not report.copied
    two.eval(), three.eval()
    with torch.no_grad():
        assert torch.equal(two(tokens()).logits, three(tokens()).logits)


def test_a_fade_that_was_cut_short_is_told():
    """A shell of a stage that was too short counts for less than all, and does so ever after."""
    for steps, told in ((3, ["s2"]), (6, [])):
        _, two = grown("split")
        train(two, steps)
        three = onion(shell(1, frozen=True), shell(2, frozen=True), shell(3, blend=Blend(steps=4)))
        report = load_into(three, two.config, two.state_dict())
        assert list(report.faded) == told
        assert any("shell s2 counts for 0.5" in line for line in report.lines()) == bool(told)


def test_the_new_shell_learns_at_fade_zero():
    _, two = grown("split")
    two.train()
    two.advance(0)
    out = two(tokens(), labels=tokens())
    out.loss.backward()
    grads = [p.grad.abs().sum() for n, p in two.named_parameters() if ".s2_" in n and p.requires_grad]
    assert float(out.aux.stats["s2.fade/fade"]) == 0.0
    assert sum(g > 0 for g in grads) > len(grads) / 2


def test_frozen_is_bit_equal_after_100_steps_and_absent_from_the_optimizer():
    _, two = grown("split")
    before = {n: p.clone() for n, p in two.named_parameters() if not p.requires_grad}
    assert before and all("s1_" in n or n.startswith("embed") for n in before)
    optimizer = train(two, 100)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    for name, p in two.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]) and id(p) not in held and p.grad is None


def test_projection_freezes_with_the_first_shell(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.randn(V, 48)}, tmp_path / "model.safetensors")
    embed = EmbedConfig(from_=str(tmp_path), frozen=True, project=D)
    assert onion(shell(1), embed=embed).embed.project.requires_grad
    lm = onion(shell(1, frozen=True), shell(2), embed=embed)
    assert not lm.embed.project.requires_grad and not lm.embed.weight.requires_grad


def test_shared_gradient_is_the_sum_over_untied_copies():
    tied = onion(shell(1)).double()
    untied = onion(shell(1, tie=False)).double()
    own = untied.state_dict()
    source = tied.state_dict()
    untied.load_state_dict({n: source[n.replace("s1_out_", "s1_")] for n in own})
    x = tokens()
    for lm in (tied, untied):
        lm(x, labels=x).loss.backward()
    copies = dict(untied.named_parameters())
    for name, p in tied.named_parameters():
        if ".s1_" not in name or "quant" in name:
            continue
        total = copies[name].grad + copies[name.replace("s1_", "s1_out_")].grad
        torch.testing.assert_close(p.grad, total, rtol=1e-10, atol=1e-12)


def test_residual_shell_is_silent_at_first_and_heard_at_once():
    one = onion(shell(1, quant=QuantSpec("none")))
    two = onion(shell(1, quant=QuantSpec("none")), shell(2, residual=True))
    load_into(two, one.config, one.state_dict())
    one.eval(), two.eval()
    x = tokens()
    with torch.no_grad():
        assert torch.equal(one(x).logits, two(x).logits)
    train(two, 2)
    two.eval()
    with torch.no_grad():
        assert not torch.equal(one(x).logits, two(x).logits)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"to": 9}, "`to`"),
        ({"quant": QuantSpec("none")}, "`quant`"),
        ({"tie": False}, "`tie`"),
        ({"body": [SWA]}, "`body`"),
    ],
)
def test_other_shells_are_refused(change, word):
    one = onion(shell(1))
    fields = {"name": "s1", "body": BODY, "to": 8} | change
    two = onion(ShellNode(**fields), shell(2))
    with pytest.raises(model.ConfigError, match=word):
        load_into(two, one.config, one.state_dict())


def test_merge_without_bypass_is_refused():
    with pytest.raises(model.ConfigError, match="without `residual: true`"):
        onion(shell(1), shell(2, merge=4))


# ----------------------------------------------------------------------------- plain stacks


def stack(n: int, how: str = "zero") -> model.LanguageModel:
    torch.manual_seed(n)
    config = Config(
        dim=D, stack=[RepeatNode(n, [SWA, BlockNode("mlp", {})])], name="plain", grow=GrowConfig(how=how)
    )
    return model.build(config, vocab=V)


def test_zero_deepening_changes_no_logit_and_learns():
    small, deep = stack(2), stack(4)
    report = load_into(deep, small.config, small.state_dict())
    assert not report.copied and len(report.fresh) > 0
    with torch.no_grad():
        assert torch.equal(small(tokens()).logits, deep(tokens()).logits)
    train(deep, 2)
    assert any(bool((p != 0).any()) for n, p in deep.named_parameters() if n.endswith("o_proj.weight"))


def test_copy_deepening_repeats_the_old_layers():
    small, deep = stack(2), stack(4, how="copy")
    report = load_into(deep, small.config, small.state_dict())
    assert torch.equal(deep.bank["b4_swa"].block.q_proj.weight, small.bank["b0_swa"].block.q_proj.weight)
    assert report.copied["bank.b4_swa.block.q_proj.weight"] == "bank.b0_swa.block.q_proj.weight"
    assert not report.fresh


def test_a_stack_is_grown_layer_by_layer():
    """With `frozen: true` on the old layers only the new ones and what is around the stack are trained."""
    small = stack(2)
    layers = [SWA, BlockNode("mlp", {})]
    config = Config(dim=D, stack=[RepeatNode(2, layers, frozen=True), RepeatNode(2, layers)], name="plain")
    deep, open_ = model.build(config, vocab=V), stack(4)
    load_into(deep, small.config, small.state_dict())
    old = {n: p.clone() for n, p in small.named_parameters() if n.startswith("bank.")}
    assert deep.flops_per_token(16) < open_.flops_per_token(16)  # no weight gradients for half of it
    train(deep, 2)
    now = dict(deep.named_parameters())
    assert all(torch.equal(now[n], old[n]) and not now[n].requires_grad for n in old)
    assert all(p.requires_grad for n, p in now.items() if n not in old)


def test_an_onion_does_not_stand_in_a_frozen_repeat():
    node = RepeatNode(1, [OnionNode([shell(1)])], frozen=True)
    with pytest.raises(model.ConfigError, match="inside a frozen `repeat`"):
        model.build(Config(dim=D, stack=[node]), vocab=V)


def test_a_first_shell_grows_into_either_reading():
    one = onion(shell(1))
    two = onion(shell(1, frozen=True), shell(2, blend=Blend(steps=4)), reading="whole")
    load_into(two, one.config, one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(tokens()).logits, two(tokens()).logits)


def test_a_stack_that_is_no_prefix_is_refused():
    small = stack(2)
    other = model.build(Config(dim=D, stack=[RepeatNode(4, [BlockNode("mlp", {})])], name="other"), vocab=V)
    with pytest.raises(model.ConfigError, match="no prefix"):
        load_into(other, small.config, small.state_dict())


def test_the_pool_of_a_merging_shell_comes_from_the_file(tmp_path):
    """`merge: 4` is the mean; `{size, pool}` says how K codes make one, under the same rules."""
    from model import config
    from model.schema import ConfigError

    text = "dim: 32\nvocab: 50\nstack:\n  - onion:\n    - {{name: s1, body: [mlp], to: 8}}\n    - {{name: s2, body: [mlp], to: 8, residual: true, merge: {merge}}}\n"  # noqa: E501

    def load(merge: str):
        path = tmp_path / "a.yaml"
        path.write_text(text.format(merge=merge))
        return config.load(path)

    plain, gated = load("4"), load("{size: 4, pool: gated}")
    assert plain.stack[0].onion[1].merging == load("{size: 4}").stack[0].onion[1].merging
    assert config.load(config.dump(gated)) == gated
    assert config.arch_digest(plain) != config.arch_digest(gated)
    for pool in ("gated", "mlp"):
        lm = model.build(load(f"{{size: 4, pool: {pool}}}"))
        assert lm.bank["s2_adapter"].pool == pool and lm.bank["s2_adapter"].merge == 4
    for merge, says in (("0", "at least 1"), ("{size: 0}", "at least 1"), ("{size: 4, pool: max}", "'gated'"),
                        ("{siez: 4}", "did you mean 'size'"), ("[4]", "want int or a mapping")):  # fmt: skip
        with pytest.raises(ConfigError, match=r"a\.yaml:6:") as error:
            load(merge)
        assert says in str(error.value), (merge, str(error.value))
    with pytest.raises(ConfigError, match="without `residual: true`"):
        config.load(
            {"dim": 32, "stack": [{"onion": [{"name": "s", "body": ["mlp"], "to": 8, "merge": {"size": 2}}]}]}
        )


# ----------------------------------------------------------------------------- what would change logits


def made(*stack, **rest) -> model.LanguageModel:
    torch.manual_seed(len(stack))
    defaults = {"swa": {"head_dim": 16, "window": 5}}
    return model.build({"dim": D, "vocab": V, "defaults": defaults, "stack": list(stack), **rest}).eval()


def rings(*shells: dict, **rest) -> dict:
    return {
        "onion": [{"name": f"s{i}", "body": ["mlp"], "to": 8, **s} for i, s in enumerate(shells, 1)],
        **rest,
    }


def patch(*inner, **params) -> dict:
    return {"wrap": {"by": {"patch": params}, "inner": list(inner)}}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (
            [patch("mlp"), "mlp"],
            [patch("mlp", "mlp"), "mlp"],
            "no prefix",
        ),  # the names fit, the places do not
        ([patch("mlp", size=2)], [patch("mlp", size=3)], "no prefix"),
        (
            ["mlp", "swa"],
            [{"repeat": 2, "tied": True, "of": ["mlp", "swa"]}],
            "visits b0_mlp of .* once more",
        ),
        ([{"mlp": {}, "as": "m"}], [{"mlp": {}, "as": "m"}, {"use": "m"}], "visits m of .* once more"),
        ([rings({})], ["mlp", rings({})], "around the onion"),
        (["mlp", rings({})], [rings({}), "mlp"], "around the onion"),
        ([rings({})], [rings({}, {"blend": {"steps": 4}}, {"blend": {"steps": 4}})], "one shell a stage"),
        ([rings({})], [rings({}, {"residual": True}, reading="whole")], "cannot start silent"),
    ],
)
def test_growth_that_would_change_logits_is_refused(old, new, why):
    small, large = made(*old), made(*new)
    with pytest.raises(model.ConfigError, match=why):
        load_into(large, small.config, small.state_dict())


@pytest.mark.parametrize(
    ("was", "key"),
    [
        ({"norm_eps": 1e-2}, "norm_eps"),
        ({"optim": {"mup": {"base": 16}}}, "optim.mup"),
        ({"embed": {"scale": 3.0}}, "embed.scale"),
        ({"embed": {"tied": False}}, "embed.tied"),
        ({"heads": {"next": {"ffn": {"act": "gelu", "mult": 2}}}}, "heads.next.ffn"),
    ],
)
def test_what_no_weight_says_must_be_the_same(was, key):
    small, large = made("mlp", **was), made("mlp", "swa")
    with pytest.raises(model.ConfigError, match=key):
        load_into(large, small.config, small.state_dict())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([patch("mlp")], [patch("mlp", "swa")]),
        (["mlp"], ["mlp", patch("swa")]),
        ([rings({})], [rings({}), "mlp"]),
        (["swa", rings({})], ["swa", rings({}, {"blend": {"steps": 4}}), "mlp"]),
        ([rings({})], [rings({}, {"residual": True, "blend": {"steps": 4}}, reading="whole")]),
        ([rings({})], [rings({}, {"residual": True}, {"residual": True})]),
    ],
)
def test_what_may_be_added_changes_no_logit(old, new):
    small, large = made(*old), made(*new)
    load_into(large, small.config, small.state_dict())
    with torch.no_grad():
        assert torch.equal(small(tokens()).logits, large(tokens()).logits)


def test_a_copied_bracket_takes_its_weights_along():
    small, large = made(patch("mlp")), made(patch("mlp"), patch("mlp"), grow={"how": "copy"})
    report = load_into(large, small.config, small.state_dict())
    assert (
        not report.fresh
        and report.copied["bank.b2_patch.adapter.u.weight"] == "bank.b0_patch.adapter.u.weight"
    )


def test_the_outermost_shell_is_not_faded_in():
    with pytest.raises(model.ConfigError, match="takes no merge, residual, blend or width"):
        made(rings({"blend": {"steps": 4}}))


def test_a_frozen_shell_freezes_the_rows_that_it_reads_itself():
    assert not made(rings({"frozen": True})).embed.weight.requires_grad
    assert made("mlp", rings({"frozen": True})).embed.weight.requires_grad
